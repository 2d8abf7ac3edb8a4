"""Everything undocumented that hf_galore uses of other libraries is there, with the arguments that it gives."""

import pytest

from hf_galore.integrations import requirements

NEEDS = sorted({need for feature in requirements.FEATURES for need in feature.needs})


@pytest.mark.parametrize("need", NEEDS)
def test_it_is_there(need):
    pytest.importorskip(need.partition(":")[0].partition(".")[0])
    assert requirements.is_there(need)


@pytest.mark.parametrize(
    "need",
    [
        "transformers.trainer:no_such_function",
        "transformers.no_such_module:Trainer",
        "transformers.trainer:Trainer.no_such_method",
        "transformers.trainer:Trainer.get_decay_parameter_names(model, another)",
        "accelerate.state:GradientState(plugin, gradient_accumulation)",
        "peft.tuners.tuners_utils:BaseTuner.inject_adapter(adapter_name, model)",  # in another order
    ],
)
def test_what_is_missing_is_found_to_be(need):
    assert not requirements.is_there(need)
