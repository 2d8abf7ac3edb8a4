"""python -m hf_galore activations: its tables, files and pictures, and how it reads texts."""

import json
import math

import pytest
import torch
from activation_cases import (
    BLOCKS,
    BORN,
    DELIMITER,
    DIED,
    HEADS,
    HIDDEN,
    SIZE,
    START,
    VOCABULARY,
    inputs,
    make,
    plant,
)

import hf_galore
from hf_galore.cli import main
from hf_galore.integrations.activation_plots import landscapes, sink_map, top_curves
from hf_galore.integrations.activations import TextBatches, delimiter_ids

WORDS = ["<pad>", "<s>", "</s>", "w3", "w4", "w5", "w6", ".", *(f"w{number}" for number in range(8, VOCABULARY))]


def tokenizer(bos=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def words(count, seed=0, line=10):
    """A text in lines of `line` words, each with one delimiter in it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCABULARY, (count,), generator=generator).tolist()
    ids = [DELIMITER if number % line == 4 else one for number, one in enumerate(ids)]
    lines = [" ".join(WORDS[one] for one in ids[start : start + line]) for start in range(0, count, line)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A planted model with its tokenizer, and a text."""
    path = tmp_path_factory.mktemp("planted")
    plant(make("llama", torch.float32)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(words(200))
    return path


def run(folder, *args):
    main(["activations", str(folder), "--text", str(folder / "text.txt"), "--length", "16", *map(str, args)])


def test_the_report_is_printed(folder, capsys):
    run(folder, "--interventions")
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line.startswith("|")]
    sites = [line for line in tables if "| 21 | 1 | 3 |" in line]
    assert [line.split(" | ")[0] for line in sites] == ["| start", "| first delimiter", "| other"]
    assert "at token 0 ('<s>'), feature 21" in sites[0]
    assert "('.'), feature 21" in sites[1]
    perplexities = {line.split(" | ")[0][2:]: float(line.split(" | ")[1][:-2]) for line in tables[-3:]}
    assert list(perplexities) == ["unchanged", "zero", "mean"]
    assert all(1 < value < 10 * VOCABULARY for value in perplexities.values())


def test_files_hold_what_the_functions_give(folder, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    run(
        folder, "--output", out, "--batch-size", 3, "--sequences", 7, "--interventions", "mean", "0.5", "--blocks", "2"
    )
    model = make_from(folder)
    batches = TextBatches(tokenizer(), folder / "text.txt", 16, 3, 7)
    report = hf_galore.massive_activations(model, batches, delimiters=(DELIMITER,))
    perplexities = hf_galore.intervention_perplexity(model, batches, report, ["mean", 0.5], blocks=[2])
    read = json.loads((out / "report.json").read_text())
    assert read == report.to_dict() | {"perplexity": perplexities}
    assert read["sequences"] == 7
    assert (out / "report.md").read_text() in capsys.readouterr().out
    for name in ("magnitudes", "top", "sinks"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def make_from(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_attention_can_be_left_out(folder, tmp_path, capsys):
    run(folder, "--no-attention", "--output", tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["sink_score"] is None
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["magnitudes.png", "top.png"]


def test_a_model_without_massive_activations_says_so(folder, capsys):
    run(folder, "--magnitude", 1e6, "--interventions")
    out = capsys.readouterr().out
    assert "No activation is massive." in out
    assert "There is nothing to change, and no perplexity of it." in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--length", "1"], "Invalid length: 1 - should be >= 2"),
        (["--length", "4096"], "length=4096: .* has 128 positions"),
        (["--batch-size", "0"], "Invalid batch_size: 0"),
        (["--sequences", "0"], "Invalid sequences: 0"),
        (["--top", "0"], "Invalid top: 0"),
        (["--ratio", "-1"], "Invalid ratio"),
        (["--interventions", "median"], "change='median' is not one of zero, mean, and no number"),
        (["--interventions", "--blocks", "9"], "blocks: 9 is not one of 0 to 3"),
        (["--text", "lost.txt"], "lost.txt is not a file"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_clear_errors(folder, args, message):
    with pytest.raises(SystemExit, match=f"activations: {message}"):
        run(folder, *args)


def test_a_model_that_is_not_there_is_a_clear_error(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"activations: .*lost"):
        main(["activations", str(tmp_path / "lost"), "--text", str(folder / "text.txt")])


@pytest.fixture(scope="module")
def report():
    return hf_galore.massive_activations(plant(make("llama")), [inputs("llama")], delimiters=(DELIMITER,))


def test_the_curves_are_those_of_the_report(report):
    (axis,) = top_curves(report).axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert curves.pop("median") == [block.median for block in report.blocks]
    assert curves == {f"top {number + 1}": [block.top[number] for block in report.blocks] for number in range(3)}
    assert axis.get_yscale() == "log"


def test_the_sinks_are_those_of_the_report(report):
    axis = sink_map(report).axes[0]
    image = torch.tensor(axis.images[0].get_array())
    assert image.shape == (BLOCKS, HEADS)
    assert image.tolist() == [block.shares.start for block in report.blocks]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1", "2", "3"]


def test_no_sinks_without_attention():
    report = hf_galore.massive_activations(make("llama"), [inputs("llama")], attention=False)
    with pytest.raises(ValueError, match="it has no shares of attention to draw"):
        sink_map(report)


def test_the_landscape_shows_the_magnitudes_of_one_sequence():
    from hf_galore.attention.activations import landscape

    model = plant(make("llama", torch.float32))
    batch = inputs("llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 9:] = 0
    found = landscape(model, batch | {"attention_mask": mask}, [0, BORN, DIED])
    assert sorted(found) == [0, BORN, DIED]
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states[1 + BORN][0, :9].abs()
    assert found[BORN].shape == (9, HIDDEN)
    assert torch.allclose(found[BORN], wanted)
    panels = landscapes(found).axes
    assert [panel.get_title() for panel in panels] == ["after block 0", "after block 1", "after block 3"]
    assert panels[1].get_zlim()[1] > SIZE > panels[0].get_zlim()[1]
    drawn = torch.tensor(
        [[list(axis) for axis in line.get_data_3d()] for line in panels[1].lines]
    )  # (tokens, 3, features)
    assert torch.equal(drawn[:, 2].float(), found[BORN])
    assert torch.equal(drawn[:, 0].long(), torch.arange(9)[:, None].expand(9, HIDDEN))
    assert torch.equal(drawn[:, 1].long(), torch.arange(HIDDEN).expand(9, HIDDEN))
    with pytest.raises(ValueError, match="blocks: 4 is not one of 0 to 3"):
        landscape(model, batch, [4])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_hold_the_text_in_order(bos, batch_size, tmp_path):
    text = words(205)
    (tmp_path / "text.txt").write_text(text)
    own = tokenizer(bos)
    batches = TextBatches(own, tmp_path / "text.txt", 16, batch_size)
    found = [batch["input_ids"] for batch in batches]
    assert [batch["use_cache"] for batch in batches] == [False] * len(found)  # a second time
    rows = [row.tolist() for batch in found for row in batch]
    first = [START] if bos else []
    assert all(row[: len(first)] == first for row in rows)
    assert [one for row in rows for one in row[len(first) :]] == own(text, add_special_tokens=False).input_ids
    assert {len(row) for row in rows[:-1]} == {16}
    assert len(rows) == math.ceil(205 / (16 - bos))
    assert all(len(batch) == batch_size for batch in found[:-2])


def test_a_rest_with_nothing_to_predict_is_left_out(tmp_path):
    (tmp_path / "text.txt").write_text("w8 w9 w10 w11 w12")
    rows = [batch["input_ids"].tolist() for batch in TextBatches(tokenizer(bos=False), tmp_path / "text.txt", 4)]
    assert rows == [[[8, 9, 10, 11]]]


def test_a_text_is_read_as_far_as_it_is_needed(tmp_path):
    """What comes after 10 sequences is no text at all."""
    path = tmp_path / "text.txt"
    path.write_bytes((words(20_000) * 2).encode() + b"\xff" * 10)
    batches = TextBatches(tokenizer(), path, 16, sequences=10)
    assert len(list(batches)) == 10
    with pytest.raises(UnicodeDecodeError):
        list(TextBatches(tokenizer(), path, 16))


def test_a_line_without_end_is_cut(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(words(40_000, line=40_000))
    rows = [row for batch in TextBatches(tokenizer(), path, 101) for row in batch["input_ids"].tolist()]
    assert len(rows) in (400, 401)  # a word that is cut in two is one more
    assert rows[0][0] == rows[-1][0] == START


def test_delimiters_are_found_whatever_spaces_are_around_them():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    texts = ["▁.", ".", "..", "▁a", "<0x0A>", "▁", ".a"]
    backend = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, unk_token="▁"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert delimiter_ids(PreTrainedTokenizerFast(tokenizer_object=backend)) == (0, 1, 4)
    assert delimiter_ids(tokenizer()) == (DELIMITER,)
