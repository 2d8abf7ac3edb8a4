"""python -m hf_galore: what env reports, and that run changes nothing but the registration."""

import json
import os
import subprocess
import sys
import traceback
from argparse import Namespace

import pytest

import hf_galore
from hf_galore.cli import main

PROBE = """
import json, sys
import neighbour
def function(): pass
json.dump({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "package": __package__,
    "spec": __spec__ and __spec__.name, "main": vars(sys.modules["__main__"]) is globals(),
    "function": function.__module__,
}, sys.stdout)
"""

# Writes, into a file for its rank, which optimizer a Trainer makes.
REGISTERED = """
import os, sys, torch
from pathlib import Path
from transformers import Trainer, TrainingArguments
out = Path(sys.argv[1])
args = TrainingArguments(out, optim="galore_adamw", optim_target_modules=["0"], use_cpu=True, report_to="none")
optimizer = Trainer(torch.nn.Sequential(torch.nn.Linear(4, 4)), args).create_optimizer()
out.mkdir(exist_ok=True)
(out / os.environ.get("RANK", "0")).write_text(f"{type(optimizer).__module__} {args.world_size} {sys.argv[2:]}")
"""

HARD_ARGS = ["--help", "-m", "-h", "--", "two words", "", "--json", "-1"]


def shell(*command, cwd) -> subprocess.CompletedProcess:
    result = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def script(tmp_path):
    """Writes a script into a folder, with a module beside it, and returns its path relative to the test's folder."""

    def write(code: str, name: str = "script.py") -> str:
        path = tmp_path / "scripts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
        (path.parent / "neighbour.py").touch()
        return os.path.relpath(path, tmp_path)

    return write


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Lets `main(["run", ...])` run in this process, in the test's folder, and leaves no trace."""
    from hf_galore.integrations.accelerate import unwrap_launch_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield tmp_path
    sys.modules.pop("neighbour", None)
    unwrap_launch_command()
    hf_galore.unregister()


def test_env_text(capsys):
    main(["env"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"hf_galore: {hf_galore.__version__}" in lines
    assert any(
        line.startswith(("cpu: compiled, instruction set ", "cpu: the Python references run: ")) for line in lines
    )
    assert "transformers: importable" in lines


def test_env_json(capsys):
    main(["env", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["versions", "devices", "native ops", "integrations"]
    assert report["versions"]["python"] == sys.version.split()[0]
    assert "cpu" in report["devices"]
    assert {"accelerate", "transformers"} <= set(report["integrations"])


def test_env_tells_of_libraries_that_are_absent(tmp_path):
    code = """
import sys
sys.modules.update(dict.fromkeys(["transformers", "accelerate", "peft", "trl", "bitsandbytes"]))
from hf_galore.cli import main
main(["env", "--json"])
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout
    assert json.loads(output)["integrations"]["transformers"].startswith("ModuleNotFoundError: ")


def test_run_script_is_as_python_script(script, tmp_path):
    path = script(PROBE)
    through_run = shell("hf_galore", "run", path, *HARD_ARGS, cwd=tmp_path).stdout
    as_python = subprocess.run(
        [sys.executable, path, *HARD_ARGS], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert json.loads(through_run) == json.loads(as_python)


def test_run_module_is_as_python_module(script, here, capsys):
    script("", "__init__.py")
    script(PROBE.replace("import neighbour", "from . import neighbour"), "probe.py")
    main(["run", "-m", "scripts.probe", *HARD_ARGS])
    through_run = json.loads(capsys.readouterr().out) | {"path": str(here)}  # '' in this process
    assert through_run == json.loads(shell("scripts.probe", *HARD_ARGS, cwd=here).stdout)


def test_run_registers(script, here):
    main(["run", script(REGISTERED), "out", "--rest"])
    assert (here / "out/0").read_text() == "hf_galore.optim.adamw 1 ['--rest']"


def test_run_keeps_the_exit_code(script, here):
    with pytest.raises(SystemExit) as stop:
        main(["run", script("import sys; sys.exit(7)")])
    assert stop.value.code == 7


def test_run_keeps_the_traceback(script, here):
    path = script("def f():\n    raise KeyError('lost')\n\nf()\n")
    with pytest.raises(KeyError, match="lost") as caught:
        main(["run", path])
    ends = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(caught.tb)[-2:]]
    assert ends == [(path, 4), (path, 2)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lost.py"], "'lost.py' is neither a file nor an installed command"),
        (["lost/trl"], "'lost/trl' is neither a file nor an installed command"),
        (["sh"], "/sh is not a Python script"),
        (["-m", "lost"], "no module named 'lost'"),
        (["-m", "json.lost"], "no module named 'json.lost'"),
        (["torchrun", "train.py"], "use: torchrun OPTIONS -m hf_galore run SCRIPT ARGS"),
    ],
    ids=" ".join,
)
def test_run_of_nothing_is_a_clear_error(args, message):
    with pytest.raises(SystemExit, match=message):
        main(["run", *args])


def test_run_finds_a_command_on_the_path(script, here, monkeypatch, capsys):
    path = here / script(f"#!{sys.executable}\n{PROBE}", "probe-command")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    main(["run", "probe-command", *HARD_ARGS])
    probe = json.loads(capsys.readouterr().out)
    assert (probe["argv"], probe["path"]) == ([str(path), *HARD_ARGS], str(path.parent))


@pytest.mark.slow
def test_run_under_accelerate_launch(script, tmp_path):
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "hf_galore", "run"]
    shell(*command, script(REGISTERED), "out", "--rest", cwd=tmp_path)
    assert (tmp_path / "out/0").read_text() == "hf_galore.optim.adamw 1 ['--rest']"


@pytest.mark.slow
def test_run_under_torchrun_with_two_processes(script, tmp_path):
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "hf_galore", "run"]
    shell(*command, script(REGISTERED), "out", "--rest", cwd=tmp_path)
    for rank in "01":
        assert (tmp_path / "out" / rank).read_text() == "hf_galore.optim.adamw 2 ['--rest']"


def test_run_of_a_script_that_launches_registers_its_processes(script, tmp_path):
    command = ["hf_galore", "run", "accelerate", "launch", "--cpu", "--num_processes", 1]
    shell(*command, script(REGISTERED), "out", "--rest", cwd=tmp_path)
    assert (tmp_path / "out/0").read_text() == "hf_galore.optim.adamw 1 ['--rest']"


def launch_args(*args: str) -> Namespace:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(args)


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["train.py", "--lr", "1"], ["run", "train.py", "--lr", "1"]),
        (["-m", "train", "-m"], ["run", "-m", "train", "-m"]),
        (["-m", "hf_galore", "run", "train.py"], ["run", "train.py"]),
    ],
    ids=" ".join,
)
def test_launched_script_goes_through_run(args, command):
    from hf_galore.integrations.accelerate import through_run

    before = launch_args("--num_processes", "2", *args)
    after = through_run(before)
    assert (after.module, after.training_script, after.training_script_args) == (True, "hf_galore", command)
    assert through_run(after) is after
    assert vars(before).keys() == vars(after).keys()
    assert before.training_script == launch_args(*args).training_script


def test_launched_program_that_is_no_python_is_left_alone_with_a_warning(caplog):
    from hf_galore.integrations.accelerate import through_run

    args = launch_args("--no_python", "train")
    assert through_run(args) is args
    assert "hf_galore is not registered in train" in caplog.text


def test_wrapping_of_launch_command_is_undoable_and_idempotent():
    import accelerate.commands.launch as launch

    from hf_galore.integrations.accelerate import unwrap_launch_command, wrap_launch_command

    original, finders = launch.launch_command, list(sys.meta_path)
    wrap_launch_command()
    wrapped = launch.launch_command
    wrap_launch_command()
    assert launch.launch_command is wrapped is not original
    assert len(sys.meta_path) == len(finders) + 1
    unwrap_launch_command()
    unwrap_launch_command()
    assert launch.launch_command is original
    assert sys.meta_path == finders
