"""The report of massive activations, against a literal count over stored hidden states."""

import gc
import json
import math
import weakref

import pytest
import torch
from activation_cases import (
    BLOCKS,
    BORN,
    CONFIGS,
    DELIMITER,
    DIED,
    HIDDEN,
    MASSIVE,
    PADDINGS,
    PATCH,
    PLANTED,
    SIGN,
    SIZE,
    START,
    Boom,
    blocks_of,
    delimiters,
    dtype_for,
    hidden_states,
    hooks,
    inputs,
    kind_of,
    make,
    padded,
    plant,
    raise_boom,
    tokens,
)
from torch import nn
from version_cases import cache_in, checkpoint_activations, with_cache

import hf_galore
from hf_galore import massive_activations, record_activations
from hf_galore.attention.blocks import find_blocks
from hf_galore.attention.criterion import Criterion
from hf_galore.attention.tokens import REGISTER

LOW = Criterion(magnitude=0.02, ratio=2.0)  # that the activations of random models meet now and then


def literal(states, batch, criterion, top):
    """The report's numbers by loops over stored hidden states (batch, tokens, d) of all blocks."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    report = []
    for h in states:
        block = {"median": [], "top": [], "massive": [], "all": []}
        for row in range(len(h)):
            keep = torch.ones(h.shape[1], dtype=torch.bool) if mask is None else mask[row].bool()
            rest = h[row][keep]
            own = None if ids is None else ids[row][keep].tolist()
            flat = sorted(rest.abs().double().flatten().tolist())
            median = flat[(len(flat) - 1) // 2]
            block["median"].append(median)
            block["top"].append(flat[::-1][:top])
            for position, feature in ((p, f) for p in range(rest.shape[0]) for f in range(rest.shape[1])):
                value = float(rest[position, feature])
                token = None if own is None else own[position]
                block["all"].append((value, row, position, token, feature))
                if abs(value) > criterion.magnitude and abs(value) > criterion.ratio * median:
                    block["massive"].append((kind_of(position, own), *block["all"][-1]))
        report.append(block)
    return report


def assert_is_literal(report, wanted, top):
    batch = len(wanted[0]["median"])
    assert report.sequences == batch
    assert len(report.blocks) == len(wanted)
    for block, found in zip(report.blocks, wanted, strict=True):
        assert block.median == pytest.approx(sum(found["median"]) / batch, rel=1e-12)
        assert block.top == pytest.approx([sum(column) / batch for column in zip(*found["top"], strict=True)])
        assert block.massive == len(found["massive"])
        largest = sorted((abs(one[0]) for one in found["all"]), reverse=True)[:top]
        assert [abs(one.value) for one in block.strongest] == largest
        assert len(set(block.strongest) & set(found["all"])) == top  # which of equal ones is open
    places = {(one[0], one[-1]) for found in wanted for one in found["massive"]}
    assert {(site.token, site.feature) for site in report.sites} == places
    assert len(report.sites) == len(places)
    for site in report.sites:
        spots = [
            [one[1:] for one in found["massive"] if (one[0], one[-1]) == (site.token, site.feature)]
            for found in wanted
        ]
        alive = [number for number, spot in enumerate(spots) if spot]
        assert sorted(site.blocks) == alive
        assert site.born == alive[0]
        assert site.died == (alive[-1] + 1 if alive[-1] + 1 < len(wanted) else None)
        for number in alive:
            values = [one[0] for one in spots[number]]
            assert site.blocks[number].count == len(values)
            assert site.blocks[number].mean == pytest.approx(sum(values) / len(values), rel=1e-12)
            assert abs(site.blocks[number].strongest.value) == max(map(abs, values))
            assert site.blocks[number].strongest in spots[number]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_activation_is_found_where_it_is(name):
    model = plant(make(name))
    report = massive_activations(model, [inputs(name)], delimiters=delimiters(name))
    kinds = ["start", "other"] if name == "vit" else ["start", "first_delimiter", "other"]
    assert [(site.token, site.feature) for site in report.sites] == [(kind, MASSIVE) for kind in kinds]
    for site in report.sites:
        assert (site.born, site.died, sorted(site.blocks)) == (BORN, DIED, list(range(BORN, DIED)))
        assert site.strongest.value == pytest.approx(SIZE, rel=0.02)  # the rest of a marked token varies a little
        assert {spot.count for spot in site.blocks.values()} == {3}
    positions = {"start": [0], "first_delimiter": [4, 5, 6], "other": [PATCH] if name == "vit" else [6, 7, 8]}
    for site in report.sites:
        assert site.strongest.position in positions[site.token]
        assert site.strongest.token == (None if name == "vit" else START if site.token == "start" else DELIMITER)
    massive = 2 if name == "vit" else 3
    assert [block.massive for block in report.blocks] == [0, 3 * massive, 3 * massive, 0]
    assert all(block.strongest[0].feature == SIGN for block in report.blocks[:BORN])


def test_an_activation_that_stays_to_the_end_has_not_died():
    model = plant(make("llama"))
    del blocks_of(model)[DIED:]
    model.config.num_hidden_layers = DIED
    (site,) = massive_activations(model, [{"input_ids": tokens(2, 8)}]).sites
    assert (site.token, site.feature, site.born, site.died) == ("start", MASSIVE, BORN, None)


@pytest.mark.parametrize(("name", "side"), PADDINGS)
def test_statistics_are_those_of_stored_hidden_states(name, side):
    model, batch = make(name, dtype_for(name, side)), padded(name, side)
    report = massive_activations(model, [batch], top=5, delimiters=delimiters(name), criterion=LOW)
    wanted = literal(hidden_states(model, batch), batch, LOW, 5)
    assert any(found["massive"] for found in wanted)
    assert_is_literal(report, wanted, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_lower_precision_are_exact(dtype):
    """1,000 medians of what is in float16 may be beyond it."""
    model = plant(make("llama", dtype)).to(dtype)
    batch, high = padded("llama", "right"), Criterion(100.0, 40_000.0)
    report = massive_activations(model, [batch], delimiters=(DELIMITER,), criterion=high, attention=False)
    wanted = literal(hidden_states(model, batch), batch, high, 3)
    assert [len(found["massive"]) for found in wanted][1] > 0
    assert_is_literal(report, wanted, 3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "vit"])
def test_batches_and_padding_do_not_matter(name):
    """All rows at once, in pieces and one by one without their padding: the same to the rounding of the model."""
    model = plant(make(name))
    whole = padded(name, None if name == "vit" else "right", batch=4, length=16)
    pieces = [{key: value[part] for key, value in whole.items()} for part in (slice(0, 1), slice(1, 4))]
    alone = []
    for row in range(4):
        one = {key: value[row : row + 1] for key, value in whole.items()}
        if name != "vit":
            one = {"input_ids": one["input_ids"][:, one["attention_mask"][0].bool()]}
        alone.append(one)
    reports = [
        massive_activations(model, batches, delimiters=delimiters(name)).to_dict()
        for batches in ([whole], pieces, alone)
    ]
    assert len(reports[0]["sites"]) > 1
    for other in reports[1:]:
        assert_close(other, reports[0])


def assert_close(one, other):
    """The same structure, and numbers to 1e-6: transformers' eager softmax rounds to float32 (6e-8), in 4 blocks."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_close(mine, theirs)
    else:
        assert one == (pytest.approx(other, rel=1e-6, abs=1e-7) if isinstance(other, float) else other)


def test_the_recorder_goes_on_from_pass_to_pass():
    model = make("llama", torch.float32)
    first, second = padded("llama", None), padded("llama", "left")
    with record_activations(model, delimiters=[DELIMITER], criterion=LOW) as recorder, torch.no_grad():
        model(first["input_ids"])  # by position
        model(**second)
    joint = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]]),
        "attention_mask": torch.cat([torch.ones_like(second["input_ids"]), second["attention_mask"]]),
    }
    wanted = literal(hidden_states(model, joint), joint, LOW, 3)
    assert_is_literal(recorder.report(), wanted, 3)


def test_recording_changes_nothing():
    model, batch = make("llama", torch.float32), padded("llama", "left")
    before = model(**batch).logits
    with record_activations(model):
        assert torch.equal(model(**batch).logits, before)


def test_models_of_peft_are_reported_on():
    from peft import LoraConfig, get_peft_model

    batch = padded("llama", "right")
    wanted = massive_activations(plant(make("llama", torch.float32)), [batch], delimiters=(DELIMITER,)).to_dict()
    model = get_peft_model(plant(make("llama", torch.float32)), LoraConfig(target_modules="all-linear"))
    report = massive_activations(model, [batch], delimiters=(DELIMITER,)).to_dict()
    assert report["sites"] == wanted["sites"]
    assert [block["name"] for block in report["blocks"]] == [f"base_model.model.{b['name']}" for b in wanted["blocks"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_register_token_is_the_start(side):
    """The first of them, behind the padding; a batch is reported on as its rows alone are."""
    model = make("llama", torch.float32)  # eager attention of transformers gives NaN to padded rows in float64
    hf_galore.add_register_tokens(model, 2)
    with torch.no_grad():
        model.model.bias_tokens.tokens.copy_(torch.eye(2, HIDDEN).mul(1e4).flatten())
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    rows = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :5]}]
    if side == "left":
        ids, mask = torch.stack([ids[0], ids[1].roll(4)]), mask.flip(1)
    options = {"delimiters": [int(ids[0, -1])], "criterion": LOW}
    report = massive_activations(model, [{"input_ids": ids, "attention_mask": mask}], **options)
    alone = massive_activations(model, rows, **options)
    assert report.to_markdown() == alone.to_markdown()
    assert "register token" in report.to_markdown()
    strongest = report.blocks[0].strongest[0]
    assert (strongest.token, strongest.position) == (REGISTER, 0)
    model.model.bias_tokens.tokens.data.zero_()  # one of no magnitude is none of those
    assert "register token" not in massive_activations(model, rows, **options).to_markdown()
    hf_galore.remove_register_tokens(model)
    assert massive_activations(model, rows, **options).blocks[0].strongest[0].token != REGISTER


def test_what_is_recomputed_counts_once():
    """Gradient checkpointing runs the attention of every block again in the backward pass."""
    model, ids = make("llama"), tokens(2, 8)
    wanted = massive_activations(model, [{"input_ids": ids}]).to_dict()
    checkpoint_activations(model.train(), use_reentrant=False)
    runs = []
    counter = blocks_of(model)[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    with record_activations(model, attention=True) as recorder:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counter.remove()
    assert len(runs) == 2
    assert recorder.report().to_dict() == wanted


@pytest.mark.parametrize("name", PLANTED)
def test_hooks_and_settings_are_as_before_even_after_an_error(name):
    model = make(name, attention="eager" if name == "bloom" else "sdpa").train()
    blocks_of(model)[0].eval()
    modes, before = [module.training for module in model.modules()], hooks(model)
    configuration = model.config.to_json_string(), model.config._attn_implementation
    bomb = blocks_of(model)[2].register_forward_pre_hook(raise_boom)
    with pytest.raises(Boom):
        massive_activations(model, [inputs(name)])
    bomb.remove()
    massive_activations(model, [inputs(name)])
    assert hooks(model) == before
    assert [module.training for module in model.modules()] == modes
    assert (model.config.to_json_string(), model.config._attn_implementation) == configuration


def test_an_error_in_a_pass_does_not_spoil_the_next():
    model, ids = make("llama"), tokens(1, 8)
    with record_activations(model) as recorder:
        bomb = blocks_of(model)[3].register_forward_pre_hook(raise_boom)
        with pytest.raises(Boom):
            model(input_ids=ids)
        bomb.remove()
        blocks_of(model)[0](torch.zeros(1, 1, HIDDEN, dtype=torch.float64), position_embeddings=(torch.ones(1),) * 2)
        with pytest.raises(ValueError, match="not all of its blocks have run"):
            recorder.report()
        model(input_ids=ids)
    assert len(recorder.report().blocks) == BLOCKS


def test_memory_does_not_depend_on_the_length_of_the_text():
    """After 2 batches and after 12 the same tensors are alive, of the same sizes."""
    model = plant(make("llama"))
    alive = []

    def batches():
        for seed in range(13):
            if seed in (2, 12):
                gc.collect()
                alive.append(
                    sorted(one.nbytes for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter))
                )
            yield inputs("llama", batch=2, seed=seed)

    report = massive_activations(model, batches(), delimiters=(DELIMITER,))
    assert report.sequences == 26
    assert alive[0] == alive[1]


def test_weights_outlive_no_block_and_hidden_states_no_pass():
    """Of attention weights, those of one block are there at a time."""
    model, weights, states, alive = make("gpt2"), [], [], []

    def note_weights(module, args, output):
        alive.append(sum(one() is not None for one in weights))
        weights.append(weakref.ref(output[1]))

    def batches():
        yield inputs("gpt2")
        alive.append(sum(one() is not None for one in states))

    for block in blocks_of(model):
        block.attn.register_forward_hook(note_weights)
        block.register_forward_hook(lambda module, args, output: states.append(weakref.ref(output)))
    massive_activations(model, batches())
    assert len(states) == len(weights) == BLOCKS
    assert alive == [0] * (BLOCKS + 1)


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def shared_block():
    model = make("llama")
    blocks_of(model)[2] = blocks_of(model)[1]
    return model


def windows():
    from transformers import SwinConfig, SwinModel

    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}
    return SwinModel(SwinConfig(**sizes, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("model", "arguments", "batch", "error", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, {}, ValueError, "Sequential has no ModuleList of blocks"),
        (encoder_decoder, {}, {}, ValueError, r"several lists of blocks, encoder.block, decoder.block; pass the part"),
        (
            shared_block,
            {},
            {"input_ids": tokens(1, 4), "use_cache": False},
            ValueError,
            r"layers\.[12] runs more than once in a forward pass",
        ),
        (
            windows,
            {"attention": True},
            {"pixel_values": torch.zeros(1, 3, 32, 32)},
            ValueError,
            r"encoder\.layers\.0 attends within parts of the sequences; leave attention out",
        ),
        (lambda: make("llama"), {"top": 0}, {}, ValueError, "Invalid top: 0 - should be >= 1"),
        (lambda: make("llama"), {"top": 2.5}, {}, TypeError, "top=2.5 is not an integer"),
        (lambda: make("llama"), {"attention": "yes"}, {}, TypeError, "attention='yes' is not True or False"),
        (lambda: make("llama"), {"delimiters": ["."]}, {}, TypeError, "delimiters='.' is not an integer"),
        (lambda: make("llama"), {"top": 999}, {"input_ids": tokens(1, 4)}, ValueError, "top=999 is more than the 128"),
        (
            lambda: make("llama"),
            {"delimiters": [DELIMITER]},
            {"inputs_embeds": torch.zeros(1, 3, HIDDEN, dtype=torch.float64)},
            ValueError,
            "delimiters: the forward pass has no input_ids",
        ),
        (
            lambda: make("llama"),
            {},
            {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
            ValueError,
            r"attention_mask: of shape \(1, 1, 4, 4\), where \(batch, tokens\) is needed",
        ),
    ],
)
def test_what_cannot_be_is_refused(model, arguments, batch, error, match):
    model = model()
    with pytest.raises(error, match=match), record_activations(model, **arguments):
        model(**batch)
    assert hooks(model) == 0


def test_a_continued_sequence_is_refused():
    model, ids = make("llama"), tokens(1, 6)
    with record_activations(model):
        cache = with_cache(model, cache_in(model(input_ids=ids[:, :4], use_cache=True)))
        with pytest.raises(ValueError, match=rf"{next(iter(cache))}: whole sequences are needed.*use_cache=False"):
            model(input_ids=ids[:, 4:], **cache)


def test_activations_that_are_not_finite_are_refused():
    model = make("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[START, 3] = math.nan
    with pytest.raises(ValueError, match="sequence 0 has activations that are not finite"):
        massive_activations(model, [{"input_ids": tokens(1, 4)}])


def test_without_a_batch_there_is_no_report():
    with pytest.raises(ValueError, match="not all of its blocks have run"):
        massive_activations(make("llama"), [])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [((-1.0,), ValueError, "Invalid magnitude"), ((1.0, "many"), TypeError, "ratio='many' is not a number")],
)
def test_a_criterion_that_makes_no_sense_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        Criterion(*arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_those_of_the_models_own_list(name):
    model = make(name)
    assert list(find_blocks(model).values()) == list(blocks_of(model))


def test_json_has_every_number():
    model = plant(make("llama"))
    report = massive_activations(model, [inputs("llama")], delimiters=(DELIMITER,))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["sequences"] == 3
    assert read["criterion"] == {"magnitude": 100.0, "ratio": 1000.0}
    assert read["delimiters"] == [DELIMITER]
    assert [block["top"] for block in read["blocks"]] == [block.top for block in report.blocks]
    assert [block["name"] for block in read["blocks"]] == list(find_blocks(model))
    assert read["sites"][0]["blocks"][str(BORN)]["strongest"] == report.sites[0].blocks[BORN].strongest._asdict()
    assert read["sink_score"] == report.sink_score
    assert len(read["blocks"][0]["shares"]["by_position"]) == 12


def test_markdown_names_tokens_and_places():
    model = plant(make("llama"))
    report = massive_activations(model, [{"input_ids": tokens(2, 8)}], delimiters=(DELIMITER,))
    text = report.to_markdown({START: "'<s>'"})
    lines = text.splitlines()
    assert lines[-1] == "| start | 21 | 1 | 3 | 3000 | 3000 at token 0 ('<s>'), feature 21 |"
    assert lines[2 + BORN].startswith(f"| {BORN} | 3000 | ")
    assert "3000 at token 0 ('<s>'), feature 21" in lines[2 + BORN]
    assert len({line.count("|") for line in lines[: 2 + BLOCKS]}) == 1
    plain = massive_activations(make("llama"), [{"input_ids": tokens(2, 8)}], attention=False).to_markdown()
    assert plain.endswith("No activation is massive.")
    assert "| - | - |" in plain
