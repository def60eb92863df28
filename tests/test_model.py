"""Presets and networks: every preset builds and runs with whatever is missing; a mistake in a preset is named."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from vacli import VacliError
from vacli.temporal.model import Network, drop_streams
from vacli.temporal.preset import Preset, check_preset, load_preset, preset_names, preset_text

DIMS = {"mae": 6, "logmel": 64, "iresnet": 5, "vggish": 4}
# the published widths take seconds to make; their count is held by a test of its own
SMALL = {
    "mamba-va": {
        "decode.0.tcn.channels": "[12, 8]",
        "decode.0.tcn.width": "3",
        "decode.2.mamba.layers": "2",
        "decode.3.linear.dim": "8",
    },
    "crossattn": {"encode.logmel.vgg.width": "0.01"},
}


def combinations(head: str) -> list[list[str]]:
    """Every choice of the head's own streams, and two that it was not made for."""
    streams = load_preset(head).streams
    own = [list(c) for n in range(1, len(streams) + 1) for c in itertools.combinations(streams, n)]
    return [*own, ["vggish", "mae"]]


EVERY = [(head, streams) for head in preset_names() for streams in combinations(head)]


def inputs(net: Network, B: int, L: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random rows; about a third of them not seen, by each stream for itself."""
    torch.manual_seed(B + 10 * L)
    seen = {name: torch.rand(B, L) < 0.7 for name in net.streams}
    shapes = {name: (96, 64) if name in net.patched else (DIMS[name],) for name in net.streams}
    return {name: where(seen[name], torch.randn(B, L, *shape), 0.0) for name, shape in shapes.items()}, seen


def where(seen: torch.Tensor, x: torch.Tensor, junk: float) -> torch.Tensor:
    return x.masked_fill(~seen.reshape(*seen.shape, *[1] * (x.dim() - 2)), junk)


def network(head: str, streams: list[str], changes: dict[str, str] | None = None) -> Network:
    torch.manual_seed(0)
    changes = {**SMALL.get(head, {}), **(changes or {})}
    net = Network(load_preset(head, changes, streams), {name: DIMS[name] for name in streams})
    for absent in net.absent:
        torch.nn.init.normal_(absent)  # as if trained: a missing stream is told from zeros
    return net


def check_step(net: Network, streams: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]) -> None:
    out = net(streams, seen)["va"]
    assert out.shape == (*next(iter(seen.values())).shape, 2)
    assert out.isfinite().all()
    net.zero_grad()
    out.square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_a_preset_runs_forward_and_backward_with_whatever_is_missing(head, streams):
    net = network(head, streams)
    for B, L in ((2, 7), (1, 1)):
        check_step(net, *inputs(net, B, L))
    rows, seen = inputs(net, 2, 7)
    for name in streams:
        check_step(net, {n: x for n, x in rows.items() if n != name}, seen)  # a whole stream is not given
        check_step(net, rows, {**seen, name: torch.zeros(2, 7, dtype=torch.bool)})  # or saw nothing
    check_step(net, rows, {name: torch.zeros(2, 7, dtype=torch.bool) for name in streams})


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_what_stands_in_rows_that_were_not_seen_changes_nothing(head, streams):
    net = network(head, streams).eval()
    rows, seen = inputs(net, 2, 9)
    outputs, gradients = [], []
    for junk in (0.0, float("nan"), float("inf"), 1e6):
        given = {name: where(seen[name], x, junk) for name, x in rows.items()}
        net.zero_grad()
        out = net(given, seen)["va"]
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for out, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(out, outputs[0])
        assert torch.equal(gradient, gradients[0])


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_a_stream_not_given_is_one_that_saw_nothing(head, streams):
    net = network(head, streams).eval()
    rows, seen = inputs(net, 2, 9)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    for name in streams:
        without = {n: x for n, x in rows.items() if n != name}
        given = net(without, {**seen, name: nothing})["va"]
        assert torch.equal(given, net(rows, {**seen, name: nothing})["va"])


@pytest.mark.parametrize("head", preset_names())
def test_videos_packed_behind_each_other_are_as_each_alone(head):
    streams = load_preset(head).streams
    net = network(head, streams).eval()
    rows, seen = inputs(net, 1, 23)
    borders = [0, 1, 9, 23]
    start = torch.zeros(1, 23, dtype=torch.bool)
    start[0, borders[:-1]] = True
    outputs, gradients = [], []
    for packed in (True, False):
        net.zero_grad()
        parts = [(0, 23)] if packed else list(itertools.pairwise(borders))
        some = [
            net(
                {n: x[:, a:b] for n, x in rows.items()},
                {n: x[:, a:b] for n, x in seen.items()},
                start if packed else None,
            )["va"]
            for a, b in parts
        ]
        out = torch.cat(some, dim=1)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=2e-3, rtol=2e-3)


LOOKS_AHEAD = {"transformer", "crossattn", "crossattn-light"}  # attention is over the whole window


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head", sorted({*preset_names()} - LOOKS_AHEAD - {"linear"}))
def test_a_head_looks_ahead_only_if_not_causal(head, causal):
    net = network(head, ["mae", "logmel"], {"causal": str(causal).lower()}).eval()
    rows, seen = inputs(net, 2, 30)
    before = net(rows, seen)["va"]
    for t in (0, 11, 27):
        later = {name: x.clone() for name, x in rows.items()}
        unseen = {name: s.clone() for name, s in seen.items()}
        for name in rows:
            later[name][:, t + 1 :] += 5
            unseen[name][:, t + 1 :] ^= True
        after = net(later, unseen)["va"]
        same = torch.allclose(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=0)
        assert same == causal
        assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])


PARAMETERS = {
    # 2.63 M of them in the TCN, 0.85 M in Mamba, 0.26 M in the projection
    ("mamba", "mae"): 3_774_350,
    # the published 67,155,598 but for 512 that its forward pass never reads; 1,024 stand in for a stream not seen
    ("mamba-va", "mae"): 67_155_598 - 512 + 1024,
}


@pytest.mark.parametrize(("head", "stream"), PARAMETERS)
def test_a_head_has_the_parameters_it_is_said_to_have(head, stream):
    net = Network(load_preset(head, streams=[stream]), {stream: 1024})
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[head, stream]


def test_crossattn_has_vggish_whole_beside_the_rest():
    net = Network(load_preset("crossattn"), {"iresnet": 512, "vggish": 128, "logmel": 64})
    vgg = sum(p.numel() for p in net.encode[2].vgg.parameters())
    assert vgg == 72_141_184
    assert 3_500_000 < sum(p.numel() for p in net.parameters()) - vgg < 5_000_000


@pytest.mark.parametrize("head", ["crossattn", "crossattn-light"])
def test_what_is_asked_of_a_stream_that_heard_nothing_is_zero_and_not_a_number_lost(head):
    streams = load_preset(head).streams
    net = network(head, streams)
    rows, seen = inputs(net, 2, 6)
    seen = {name: s & (name == streams[0]) for name, s in seen.items()}
    check_step(net, rows, seen)
    alone = network(head, streams).eval()({streams[0]: rows[streams[0]]}, seen)["va"]
    torch.testing.assert_close(network(head, streams).eval()(rows, seen)["va"], alone)


def test_a_gate_mixes_what_was_asked_for_and_what_was_found():
    plain, gated = (
        network("crossattn", ["mae", "vggish"], {"cross_attn.gate": gate}).eval()
        for gate in ("false", "true")
    )
    rows, seen = inputs(gated, 2, 6)
    assert sum(p.numel() for p in gated.parameters()) > sum(p.numel() for p in plain.parameters())
    assert not torch.allclose(gated(rows, seen)["va"], plain(rows, seen)["va"])
    check_step(gated, rows, seen)


@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_stream_is_gone_for_the_whole_video_and_one_stays(packed):
    torch.manual_seed(0)
    seen = {name: torch.rand(400, 12) < 0.8 for name in ("a", "b", "c")}
    seen["c"][:] = False  # never there: it cannot be the one that stays
    start = torch.zeros(400, 12, dtype=torch.bool)
    start[:, [0, 5]] = True
    left = drop_streams(seen, start if packed else None, 0.6)
    for part in (slice(0, 5), slice(5, 12)) if packed else (slice(0, 12),):
        gone = []
        for name in ("a", "b"):
            whole, some = seen[name][:, part], left[name][:, part]
            kept = (some == whole).all(1)
            assert (kept | ~some.any(1)).all()
            gone.append((~kept).float().mean())
        assert torch.stack([left[n][:, part] for n in seen]).any(0).any(1).float().mean() > 0.99
        assert 0.3 < min(gone) < max(gone) < 0.55  # 0.6, less where both were drawn and one stays
    if packed:  # each video by itself
        a = [left["a"][:, part].any(1) for part in (slice(0, 5), slice(5, 12))]
        assert (a[0] != a[1]).any()


def test_in_a_packed_line_every_video_keeps_a_stream_that_saw_it():
    torch.manual_seed(0)
    seen = {name: torch.ones(300, 12, dtype=torch.bool) for name in ("a", "b")}
    seen["b"][:, 5:] = False  # the second video of each line is seen by one stream
    start = torch.zeros(300, 12, dtype=torch.bool)
    start[:, [0, 5]] = True
    left = drop_streams(seen, start, 0.5)
    assert left["a"][:, 5:].all()
    assert (left["a"] | left["b"])[:, :5].all()


def test_modality_dropout_acts_in_training_only():
    net = network("linear", ["mae", "vggish"], {"train.modality_dropout": "0.9"})
    rows, seen = inputs(net, 8, 6)
    torch.manual_seed(0)
    assert not torch.equal(net(rows, seen)["va"], net(rows, seen)["va"])
    net.eval()
    assert torch.equal(net(rows, seen)["va"], net(rows, seen)["va"])


def test_standardising_takes_the_moments_it_is_given():
    net = network("linear", ["mae", "logmel"]).eval()
    rows, seen = inputs(net, 2, 5)
    plain = net(rows, seen)["va"]
    moments = {name: (torch.full((DIMS[name],), 3.0), torch.full((DIMS[name],), 2.0)) for name in rows}
    net.standardise_by(moments)
    torch.testing.assert_close(net({name: 2 * x + 3 for name, x in rows.items()}, seen)["va"], plain)
    raw = network("linear", ["mae", "logmel"], {"encode.*.standardise": "false"}).eval()
    raw.standardise_by(moments)
    torch.testing.assert_close(raw(rows, seen)["va"], plain)


def test_any_track_name_can_be_a_stream():
    names = [
        "mae@0123abcd",
        "mae-tuned",
        "audio.v2",
        "half",
        "type",
    ]  # the last two are words of torch.nn.Module
    net = Network(load_preset("linear", streams=names), dict.fromkeys(names, 3))
    seen = {name: torch.ones(1, 2, dtype=torch.bool) for name in names}
    assert net({name: torch.ones(1, 2, 3) for name in names}, seen)["va"].shape == (1, 2, 2)


def test_a_stream_chosen_by_digits_is_encoded_as_its_plain_name_says():
    changes = {"encode.mae.blocks": "[{linear = {dim = 5}}]"}
    net = Network(load_preset("linear", changes, ["mae@01", "logmel"]), {"mae@01": 3, "logmel": 4})
    assert [encoder.dim for encoder in net.encode] == [5, 4]


def test_the_first_stream_is_encoded_by_name_or_as_first_and_the_others_are_not(tmp_path):
    mine = tmp_path / "mine.toml"
    blocks = {"first": 5, "mae": 6, '"*"': 7}
    tables = "".join(f"[encode.{k}]\nblocks = [{{ linear = {{ dim = {d} }} }}]\n" for k, d in blocks.items())
    mine.write_text(f'name = "mine"\nstreams = ["mae", "vggish"]\n{tables}')
    for streams, dims in (
        (["mae", "vggish"], [6, 7]),
        (["vggish", "mae"], [5, 6]),
        (["iresnet", "vggish"], [5, 7]),
    ):
        net = Network(load_preset(str(mine), streams=streams), DIMS)
        assert [encoder.dim for encoder in net.encode] == dims


def test_a_stream_brought_from_outside_can_have_an_encoder_of_its_own():
    changes = {"encode.other.blocks": "[{linear={dim=256}}]", "encode.more.blocks": "[{linear={dim=256}}]"}
    preset = load_preset("mamba", changes, ["mae", "other", "more@01"])
    assert {"other", "more"} <= preset.encode.keys()
    assert "encode.othr" in refusal(changes={"encode.othr.blocks": "[]"}, streams=["mae", "other"])


def test_a_vgg_starts_from_the_weights_the_preset_names(tmp_path):
    changes = SMALL["crossattn"]
    made = network("crossattn", ["mae", "logmel"]).encode[1].vgg
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, tmp_path / "vgg.safetensors")
    torch.manual_seed(1)
    preset = load_preset(
        "crossattn", {**changes, "encode.logmel.vgg.weights": str(tmp_path / "vgg.safetensors")}
    )
    net = Network(preset.model_copy(update={"streams": ["mae", "logmel"]}), DIMS)
    assert not torch.equal(net.encode[1].vgg.embeddings[0].weight, made.embeddings[0].weight)
    net.start_vgg()
    assert torch.equal(net.encode[1].vgg.embeddings[0].weight, made.embeddings[0].weight)


def test_a_vgg_refuses_a_stream_that_is_no_log_mel():
    with pytest.raises(VacliError, match=r"encode.logmel.vgg.*64 bands, got a stream of 4"):
        Network(load_preset("crossattn", streams=["mae", "logmel"]), {"mae": 6, "logmel": 4})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(VacliError, match=r"cross_attn.*5 heads do not divide 64"):
        Network(load_preset("crossattn", {"cross_attn.heads": "5"}, ["mae", "vggish"]), DIMS)


# ---- presets -------------------------------------------------------------------------------------------------


def refusal(
    head: str = "mamba", changes: dict[str, str] | None = None, streams: list[str] | None = None
) -> str:
    with pytest.raises(VacliError) as e:
        load_preset(head, changes, streams)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("head", preset_names())
def test_a_preset_says_where_it_comes_from_and_survives_its_own_dump(head):
    preset = load_preset(head)
    assert preset.name == head
    assert preset.source
    assert preset_text(head).startswith("#")
    assert check_preset(preset.model_dump(), "the dump") == preset


def test_a_key_is_changed_from_outside_at_any_depth():
    preset = load_preset(
        "mamba",
        {
            "train.epochs": "7",
            "train.lr": "1e-2",
            "fuse": "concat",
            "encode.*.standardise": "false",
            "encode.logmel.blocks": "[{linear = {dim = 12}}, {norm = {}}]",
            "decode.0.tcn.width": "7",
            "decode.0.tcn.channels.3": "64",
            "streams": '["logmel"]',
        },
    )
    assert (preset.train.epochs, preset.train.lr, preset.fuse) == (7, 0.01, "concat")
    assert not preset.encode["*"].standardise
    assert preset.encode["logmel"].blocks == [{"linear": {"dim": 12}}, {"norm": {}}]
    assert preset.streams == ["logmel"]
    assert preset.decode[0]["tcn"] == {"channels": [256, 256, 256, 64], "width": 7, "dropout": 0.2}
    assert preset.train.patience == load_preset("mamba").train.patience


MISTAKES = {
    "train.epoch = 3": ("unknown key train.epoch", "epochs, batch, lr", "for example epochs = 50"),
    "epochs = 3": ("unknown key epochs", "streams, causal, encode"),
    "encode.*.block = []": ("unknown key encode.*.block", "standardise, vgg, blocks"),
    "tasks.va.dim = 3": ("unknown key tasks.va.dim", "hidden"),
    "tasks.au.hidden = 3": ("tasks.au", "'va'"),
    "tasks = {}": ("tasks", "at least 1"),
    "windows.hop = 3": ("unknown key windows.hop", "length, stride"),
    "train.epochs = many": ("train.epochs", "integer", "'many'"),
    "train.epochs = 3.5": ("train.epochs", "integer", "'3.5'"),
    'train.epochs = "3"': ("train.epochs", "integer", "'3'"),
    "train.epochs = 0": ("train.epochs", "greater than or equal to 1", "'0'"),
    "train.lr = inf": ("train.lr", "finite", "'inf'"),
    "train.lr = true": ("train.lr", "number", "'True'"),
    "windows.stride = 1001": ("stride 1001", "length 1000"),
    "fuse = add": ("fuse", "'sum', 'concat' or 'cross_attn'", "'add'"),
    "cross_attn.head = 2": ("unknown key cross_attn.head", "heads, dropout, gate, near"),
    "encode.*.vgg = {wide = 2}": ("unknown key encode.*.vgg.wide", "width, window, weights"),
    "train.schedule = step": ("train.schedule", "'cosine' or 'plateau'", "'step'"),
    "train.precision = half": ("train.precision", "'bfloat16'", "'half'"),
    "train.lr_min = 1.0": ("train: lr_min 1 is above lr 0.0003",),
    "train.ema = 1.0": ("train.ema", "less than 1", "'1.0'"),
    "train.modality_dropout = 1": ("train.modality_dropout", "less than 1"),
    "streams = []": ("streams", "at least 1"),
    'streams = ["mae", "mae"]': ("streams", "twice", "mae, mae"),
    "encode.maee.standardise = false": ("encode.maee", "logmel, mae"),
    "decode = [{tcm = {}}]": ("decode", "unknown block 'tcm'", "linear, norm, tcn, multi_tcn, mamba"),
    "decode = [{linear = {dims = 3}}]": ("decode", "block linear", "dims"),
    "decode = [{linear = {dim = 3, bias = true}}]": ("decode", "block linear", "unknown key bias", "dim"),
    "decode = [{norm = {dim = 3}}]": ("decode", "block norm", "unknown key dim", "none"),
    "decode = [{linear = {}}]": ("decode", "block linear", "dim", "required"),
    'decode = [{linear = {dim = "wide"}}]': ("decode", "block linear", "dim", "'wide'"),
    "decode = [{linear = {dim = 0}}]": ("decode", "block linear", "dim", "'0'"),
    "decode = [{linear = {dim = -4}}]": ("decode", "block linear", "dim", "'-4'"),
    "decode = [{tcn = {channels = [], width = 3, dropout = 0.1}}]": ("block tcn", "channels", "at least 1"),
    "decode = [{tcn = {channels = [4, 2.5], width = 3, dropout = 0}}]": ("block tcn", "channels.1", "'2.5'"),
    "decode = [{linear = {dim = 3}, norm = {}}]": ("decode", "one name with its options"),
    "decode.9.tcn = {}": ("9 is no place in a list of 3", "counted from 0"),
    "decode.tcn = {}": ("tcn is no place in a list of 3",),
    "fuse.gate = true": ("fuse is no table",),
    "name = My Head": ("name", "'My Head'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_preset_is_one_line_that_names_it(mistake):
    key, _, value = mistake.partition(" = ")
    told = refusal(changes={key: value})
    for part in MISTAKES[mistake]:
        assert part in told


def test_an_unknown_head_lists_the_known_ones():
    told = refusal("manba")
    assert "'manba'" in told
    for name in preset_names():
        assert name in told


def test_a_preset_file_that_is_missing_or_no_toml_or_no_text_is_one_line(tmp_path):
    (tmp_path / "bad.toml").write_text("name = \n")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for file, part in (("absent.toml", "No such file"), ("bad.toml", "line 1"), ("bytes.toml", "decode")):
        told = refusal(str(tmp_path / file))
        assert file in told
        assert part in told


def test_a_file_of_ones_own_is_a_head(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nstreams = ["mae"]\n')
    assert load_preset(str(mine), {"train.epochs": "2"}) == Preset(
        name="mine", streams=["mae"], train=load_preset(str(mine)).train.model_copy(update={"epochs": 2})
    )


def test_streams_of_unlike_widths_cannot_be_summed():
    preset = load_preset("linear", {"fuse": "sum"})
    with pytest.raises(VacliError, match=r"one width.*'mae': 6, 'logmel': 64.*concat"):
        Network(preset, DIMS)


def test_a_dropout_beyond_one_is_refused():
    block = "[{tcn = {channels = [4], width = 3, dropout = 2.0}}]"
    with pytest.raises(VacliError, match=r"block tcn .*dropout.*2\.0"):
        Network(load_preset("mamba", {"decode": block}), DIMS)
