// The kernels for any processor, in vectors of 128 bits.
#define HF_GALORE_ISA generic
#define HF_GALORE_NAME "generic"
#define HF_GALORE_LANES 4
#define HF_GALORE_TILE_ROWS 6
#include "isa.h"

namespace hf_galore {
HF_GALORE_KERNELS(generic_kernels);
}
