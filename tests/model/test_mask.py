"""Windows and documents: masks against loops, logits and gradients against separate documents, counts against masks."""

import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from gptperf import registry
from gptperf.cards import causal_pairs
from gptperf.config import ModelConfig, command_line
from gptperf.errors import ConfigError
from gptperf.flops import flops_per_token
from gptperf.model import GPT, SDPA, KVCache
from gptperf.model.generate import generate
from gptperf.model.mask import Mask, _block_mask, document_starts, make_masks

END = 7


def model(**changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 48, "vocab_size": 50}
    gpt = GPT(ModelConfig(arch_preset="custom", **{**sizes, **changes})).double()
    for parameter in gpt.parameters():  # larger weights than at the start of training, so that attention matters
        torch.nn.init.normal_(parameter, std=0.3)
    if gpt.config.position_encoding == "rope":  # float32 angles of different positions differ by their rounding
        inverse = 1e4 ** -(torch.arange(0, gpt.config.head_width, 2).double() / gpt.config.head_width)
        angle = torch.arange(gpt.config.block_size).double()[:, None] * inverse
        gpt.position.cos, gpt.position.sin = angle.cos(), angle.sin()
    return gpt


def tokens(batch: int = 2, length: int = 48) -> Tensor:
    """Random tokens with documents of different lengths: empty ones, long ones, and one that has no end."""
    torch.manual_seed(1)
    found = torch.randint(8, 50, (batch, length))
    for row, ends in enumerate(([3, 4, 20], [0, 31, 47])[:batch]):
        found[row, ends] = END
    return found


def seen(T: int, S: int, window: int | None, starts: list[list[int]]) -> Tensor:
    """The mask by its definition, (B, T, S)."""
    out = torch.zeros(len(starts), T, S, dtype=torch.bool)
    for b, t, s in itertools.product(range(len(starts)), range(T), range(S)):
        query = S - T + t
        out[b, t, s] = s <= query and (window is None or query - s < window) and s >= starts[b][query]
    return out


def test_document_starts() -> None:
    x = torch.tensor([[1, END, 2, 3, END, END, 4], [END, 1, 1, 1, 1, 1, END]])
    assert document_starts(x, END).tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("T", [1, 4, 9])
def test_dense_mask(window: int | None, T: int) -> None:
    S = 9
    zeros = [[0] * S]
    assert (Mask(window, None, None).dense(T, S, torch.device("cpu")) == seen(T, S, window, zeros)[0]).all()
    if T == S:
        starts = [[0, 0, 2, 2, 2, 5, 6, 6, 6], [0] * 9]
        mask = Mask(window, torch.tensor(starts, dtype=torch.int32), None)
        assert (mask.dense(T, S, torch.device("cpu"))[:, 0] == seen(T, S, window, starts)).all()


@pytest.mark.parametrize("window", [1, 100, 128, 129, 200, 256, 300, 640])
@pytest.mark.parametrize("documents", [False, True])
def test_block_mask_has_the_blocks_of_the_dense_mask(window: int, documents: bool) -> None:
    """A whole block has no masked pair, and the listed blocks are those that have a pair."""
    T, n = 640, 5
    x = torch.randint(0, 200, (3, T))
    x[0, [0, 127, 128, 300]] = END
    starts = document_starts(x, END) if documents else None
    blocks = _block_mask(window, T, starts, torch.device("cpu"))
    dense = Mask(window, starts, None).dense(T, T, torch.device("cpu"))
    dense = dense if documents else dense[None, None]
    tiles = dense.reshape(-1, n, 128, n, 128).transpose(2, 3).flatten(3)  # (B, n, n, 128 * 128)
    listed = torch.zeros(tiles.shape[:3], dtype=torch.int32)
    for kind, counts, indices in (
        (1, blocks.kv_num_blocks, blocks.kv_indices),
        (2, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for b, q in itertools.product(range(len(tiles)), range(n)):
            for key in indices[b, 0, q, : counts[b, 0, q]]:
                assert listed[b, q, key] == 0
                listed[b, q, key] = kind
    assert ((listed == 2) == tiles.all(-1)).all()
    assert ((listed > 0) == tiles.any(-1)).all()
    query, key = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    for b in range(len(dense)):
        assert (blocks.mask_mod(torch.tensor(b), torch.tensor(0), query, key) == dense[b, 0]).all()


def test_layers_with_equal_windows_share_a_mask() -> None:
    masks = make_masks((4, 4, 48, 4), 48, None, None)
    assert masks[0] is masks[1] is masks[3]
    assert masks[2] is None
    assert make_masks((48, 48), 32, None, None) == [None, None]


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("position", ["rope", "learned_absolute", "none"])
@pytest.mark.parametrize("window", ["full", "5,full,2"])
def test_documents_do_not_see_each_other(backend: str, position: str, window: str) -> None:
    """Logits and gradients of a row are those of its documents alone, each from position 0."""
    gpt = model(attention_backend=backend, position_encoding=position, window=window)
    x = tokens()
    gpt.document_end = END
    packed = gpt(x)
    packed.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in gpt.parameters()]  # type: ignore[union-attr]
    gpt.zero_grad()
    gpt.document_end = None
    for row, logits in zip(x, packed, strict=True):
        ends = [-1, *(row == END).nonzero().flatten().tolist()]
        for begin, end in zip(ends, [*ends[1:], len(row) - 1], strict=True):
            if begin == end:
                continue
            alone = gpt(row[None, begin + 1 : end + 1])
            torch.testing.assert_close(logits[begin + 1 : end + 1], alone[0], rtol=0, atol=1e-10)
            alone.square().sum().backward()
    for parameter, expected in zip(gpt.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
def test_a_window_limits_what_a_token_sees(position: str) -> None:
    """Through L layers of windows w, a token is reached by the L (w - 1) tokens before it and no other."""
    gpt = model(position_encoding=position, window="4")
    embedded = gpt.wte(tokens()).detach().requires_grad_()
    gpt.wte.register_forward_hook(lambda *_: embedded)
    gpt(tokens())[:, 40].sum().backward()
    reached = embedded.grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert reached.nonzero()[:, 1].unique().tolist() == list(range(40 - 3 * 3, 41))


def test_backends_agree_with_windows() -> None:
    logits = [model(attention_backend=backend, window="3,full,9")(tokens()) for backend in ("sdpa", "manual")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    assert (model()(tokens()) - logits[0]).abs().max() > 0.01


@pytest.mark.parametrize("step", [1, 5])
def test_generation_with_a_cache_uses_the_window(step: int) -> None:
    gpt = model(position_encoding="rope", window="3,full,9")
    caches = [KVCache(45) for _ in range(3)]
    parts = [gpt(tokens()[:, i : i + step], caches=caches) for i in range(0, 45, step)]
    torch.testing.assert_close(torch.cat(parts, dim=1), gpt(tokens()[:, :45]), rtol=0, atol=1e-10)


def test_samples_have_no_document_mask() -> None:
    """A text that is continued is one document, also after a token that ends documents."""
    gpt = model(position_encoding="rope", window="3,full,9").eval()
    texts = []
    for end in (None, END):
        gpt.document_end = end
        keys: dict[str, Any] = {"vocab_size": 50, "temperature": 0, "top_k": 0, "generator": torch.Generator()}
        texts.append(list(generate(gpt, tokens()[0, :22], 30, **keys)))
    assert texts[0] == texts[1]


def test_recomputation_keeps_the_mask() -> None:
    losses = []
    for recompute in ("none", "selective", "full"):
        gpt = model(window="4,full,9")
        gpt.document_end, gpt.recompute = END, recompute
        gpt(tokens(), tokens().roll(-1, 1)).backward()
        losses.append([parameter.grad for parameter in gpt.parameters()])
    for other in losses[1:]:
        assert all((x == y).all() for x, y in zip(losses[0], other, strict=True))  # type: ignore[union-attr]


# Counts.


@pytest.mark.parametrize("T", [1, 2, 7, 64])
def test_pairs_are_those_of_the_mask(T: int) -> None:
    for window in (1, 2, 3, 63, 64, 100):
        assert causal_pairs(T, window) == int(seen(T, T, window, [[0] * T]).sum())


def test_flops_count_the_pairs_of_each_layer() -> None:
    config = ModelConfig(arch_preset="custom", n_layer=5, n_head=4, n_embd=32, block_size=48, window="3,full")
    full = flops_per_token(dataclasses.replace(config, window="full"))
    count = flops_per_token(config)
    assert config.windows == (3, 48, 3, 48, 3)
    pairs = sum(int(Mask(w, None, None).dense(48, 48, torch.device("cpu")).sum()) for w in config.windows)
    assert count.scores == 4 * pairs * 32
    assert dataclasses.replace(count, scores=0) == dataclasses.replace(full, scores=0)
    assert flops_per_token(config, "palm").scores == flops_per_token(full_config(config), "palm").scores


def full_config(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, window="full")


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("0", "found '0', wanted a number of tokens above 0, full, or several.*nearest: full"),
        ("full,-3", "found '-3', wanted .*nearest: 3"),
        ("", "found '', wanted"),
        ("512,", "found '', wanted .*nearest: 512"),
        ("1.5", "found '1.5', wanted"),
        ("Full", "found 'Full'"),
        ("1,2,3,4", "has 4 parts for n_layer = 3"),
    ],
)
def test_wrong_windows_are_refused(window: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command_line.resolve([f"--window={window}", "--n_layer=3"])


KINDS = ("attention_backend", "norm_position", "position_encoding")


@pytest.mark.parametrize("kind", KINDS)
def test_cards_say_what_takes_a_mask(kind: str) -> None:
    for name in registry.KINDS[kind]:
        card, cls = registry.card(kind, name), registry.component(kind, name)
        method, argument = (cls.embed, "starts") if kind == "position_encoding" else (cls.forward, "mask")
        assert (argument in inspect.signature(method).parameters) == (card.documents or getattr(card, "windows", False))


@pytest.mark.parametrize("card", [None, False, True])
@pytest.mark.parametrize(
    ("kind", "variant"), [(kind, "documents") for kind in KINDS] + [(kind, "windows") for kind in KINDS[:2]]
)
def test_a_plugin_without_masks_is_refused(
    kind: str, variant: str, card: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A component runs windows and documents only if its card says so; without them, any component runs."""
    for table in ("_components", "_cards"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    built_in = registry.KINDS[kind][0]
    told = None if card is None else dataclasses.replace(registry.card(kind, built_in), **{variant: card})
    registry.register(kind, "own", registry.component(kind, built_in), told)
    flag = "--window=5" if variant == "windows" else "--document_mask=True"
    argv = ["tiny", f"--{kind}=own"]
    command_line.resolve([*argv, "--window=100000"])
    if card:
        command_line.resolve([*argv, flag])
        return
    with pytest.raises(ConfigError, match=f"found {kind} = 'own', which does not run {variant}; wanted .*nearest: "):
        command_line.resolve([*argv, flag])


# FlexAttention.


def small_model(window: str) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 2, "n_embd": 128, "block_size": 256, "vocab_size": 64}
    return GPT(ModelConfig(arch_preset="custom", window=window, **sizes))


@pytest.mark.parametrize("window", ["full", "100,200,full"])
def test_one_graph_serves_all_documents_and_windows(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU FlexAttention runs without gradients: its logits are those of dense masks, without a recompilation."""
    torch._dynamo.reset()
    gpt = small_model(window).eval().requires_grad_(False)
    gpt.document_end = END
    batches = [torch.randint(0, 64, (2, 256)) for _ in range(3)]
    dense = [gpt(x) for x in batches]
    monkeypatch.setattr("gptperf.model.gpt.make_masks", lambda *args: make_masks(*args[:3], torch.device("cpu")))
    for block in gpt.blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, wanted in zip(batches, dense, strict=True):
            torch.testing.assert_close(gpt(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flex", [False, True])
def test_the_model_as_one_graph(flex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph makes the masks too; a further batch needs no new graph."""
    torch._dynamo.reset()
    gpt = small_model("100,200,full").requires_grad_(not flex)
    gpt.document_end = END
    batches = [torch.randint(0, 64, (2, 256)) for _ in range(2)]
    wanted = [gpt(x, x) for x in batches]
    if flex:
        monkeypatch.setattr("gptperf.model.gpt.make_masks", lambda *args: make_masks(*args[:3], torch.device("cpu")))
    gpt.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, loss in zip(batches, wanted, strict=True):
            found = gpt(x, x)
            torch.testing.assert_close(found, loss, rtol=0, atol=1e-6)
            if not flex:
                gradients = [torch.autograd.grad(out, gpt.parameters(), retain_graph=True) for out in (found, loss)]
                torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# On a GPU.


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("window", "documents"), [(None, True), (200, True), (200, False), (1, False)])
def test_flex_attention_is_as_exact_as_a_dense_mask(kv_heads: int, window: int | None, documents: bool) -> None:
    """Output and gradients in bfloat16: at most twice the error of SDPA with a mask of T x T elements."""
    B, T, H, D = 2, 640, 4, 64
    x = torch.randint(0, 150, (B, T), device="cuda")
    starts = document_starts(x, END) if documents else None
    [mask] = make_masks((window or T,), T, starts, x.device)
    assert mask is not None
    config = ModelConfig(arch_preset="custom", n_head=H, n_kv_head=kv_heads, n_embd=H * D)
    backend = SDPA(config)
    inputs = [torch.randn(B, T, n, D, device="cuda", dtype=torch.bfloat16) for n in (H, kv_heads, kv_heads)]
    dy = torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)

    def run(dtype: torch.dtype, mask: Mask) -> list[Tensor]:
        q, k, v = (t.to(dtype).requires_grad_() for t in inputs)
        y = backend(q, k, v, mask)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy.to(dtype))]

    dense = mask._replace(blocks=None)
    exact = run(torch.float64, dense)
    for found, eager, true in zip(run(torch.bfloat16, mask), run(torch.bfloat16, dense), exact, strict=True):
        assert error(found, true) <= 2 * error(eager, true) + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("window", ["full", "100,200,full"])
@pytest.mark.parametrize("documents", [False, True])
def test_new_documents_need_no_new_compilation(window: str, documents: bool) -> None:
    torch._dynamo.reset()
    gpt = small_model(window).to("cuda", torch.bfloat16)
    gpt.document_end = END if documents else None
    gpt.compile_blocks()
    for step in range(5):
        x = torch.randint(0, 64, (2, 256), device="cuda")
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            gpt(x, x).backward()
