"""python -m hf_galore: the command line."""

from hf_galore.cli import main

if __name__ == "__main__":
    main()
