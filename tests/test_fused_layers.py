"""With fuse="layer", a sum and the norm behind it are one pass, and nothing else differs."""

from __future__ import annotations

import copy
import functools
import json
import linecache
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import normkit
from norm_models import BF16, F16, F32, LlamaRMSNorm, counted, near, rows


def noted(function):
    """A decorator as libraries have them."""

    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        self.__dict__.setdefault("noted", []).append(len(args))
        return function(self, *args, **kwargs)

    return wrapper


class Block(nn.Module):
    """As a layer of Llama: two sums, the second of which the next layer normalises."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.input_norm, self.post_norm = LlamaRMSNorm(n), LlamaRMSNorm(n)
        self.attention, self.mlp = nn.Linear(n, n), nn.Linear(n, n)

    @noted
    def forward(self, hidden_states, scale=1.0):
        residual = hidden_states
        hidden_states = self.input_norm(hidden_states)
        hidden_states = self.attention(hidden_states)
        hidden_states = residual + hidden_states * scale
        residual = hidden_states
        hidden_states = self.post_norm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class PostNorm(nn.Module):
    """As BERT's: the sum is an argument, and nobody else wants it."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.linear, self.LayerNorm = nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, x):
        return self.LayerNorm(self.linear(x) + x)


class PreNorms(nn.Module):
    """As timm's: each sum begins with the norm of the last one."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(n) for _ in range(3))
        self.attn, self.mlp = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x + self.mlp(self.norm3(x))


class InPlace(PreNorms):
    """Of which no gradient can be had, before or after."""

    def forward(self, x):
        x = x + self.attn(x)
        x += self.mlp(self.norm1(x))
        return x


class Nested(nn.Module):
    """Blocks within blocks, private names and a call of the base class."""

    __scale = 2.0

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n)

    def forward(self, x, y=None):
        for _ in range(2):
            try:
                if y is not None:
                    total = x + y
                    x = y = self.norm(total)
                else:
                    y = x * self.__scale
            finally:
                super().extra_repr()
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            total = x + y
            return self.norm(total)


LAYERS = {Block: ["post_norm"], PostNorm: ["LayerNorm"], PreNorms: ["norm2", "norm3"],
          Nested: ["norm", "norm"], InPlace: ["norm1"]}  # fmt: skip


def made(cls, dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    return cls().to(dtype)


def fused(module: nn.Module) -> nn.Module:
    assert normkit.convert(module, fuse="layer").modules
    return module


def fused_calls(module: nn.Module, *args) -> int:
    """How many calls took a sum with them."""
    with counted(sums=True) as seen:
        module(*args)
    return len(seen)


# ------------------------------------------------------------------------------------ what is fused


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("cls", LAYERS)
def test_sums_are_fused_with_the_same_bits(cls, dtype):
    m, x = made(cls, dtype), rows(dtype)
    original = m(x)
    normkit.convert(m)
    with torch.no_grad():
        expected = m(x)
    report = normkit.convert(m, fuse="layer")
    assert [(layer.path, list(layer.norms)) for layer in report.layers] == [("", LAYERS[cls])]
    with torch.no_grad():
        assert fused_calls(m, x) == len(LAYERS[cls])
        y = m(x)
    assert torch.equal(y, expected)
    assert (y.stride(), y.dtype) == (expected.stride(), expected.dtype)
    assert near(y, original) or dtype is F16


@pytest.mark.parametrize("cls", [cls for cls in LAYERS if cls is not InPlace])
def test_gradients_are_those_of_before(cls):
    def gradients(m):
        x = rows().requires_grad_()
        m(x).square().sum().backward()
        return [x.grad, *(p.grad for p in m.parameters())]

    m = made(cls)
    other = fused(made(cls))
    assert fused_calls(other, rows().requires_grad_()) == len(LAYERS[cls])
    for mine, theirs in zip(gradients(other), gradients(m), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_layers_of_transformers_are_fused_with_gradient_checkpointing_and_without():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    m = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 100, (1, 7))
    normkit.convert(m)
    expected = m(input_ids=tokens).logits
    report = normkit.convert(m, fuse="layer")
    assert [layer.norms for layer in report.layers] == [("post_attention_layernorm",)] * 2
    with counted(sums=True) as seen:
        assert torch.equal(m(input_ids=tokens).logits, expected)
        assert len(seen) == 2
        newer = hasattr(m, "activation_checkpointing_enable")
        (m.activation_checkpointing_enable if newer else m.gradient_checkpointing_enable)()
        m.train()
        m(input_ids=tokens, labels=tokens).loss.backward()
        assert len(seen) == 6  # the layers run again in the backward pass
    assert m.model.layers[0].post_attention_layernorm.weight.grad.abs().sum() > 0


def test_a_decorator_stays_and_sees_what_it_saw():
    m = fused(made(Block))
    m(rows(), 2.0)
    assert m.noted == [2]
    assert type(m).forward.__wrapped__ is not Block.forward.__wrapped__
    assert Block.forward.__wrapped__.__code__ is not type(m).forward.__wrapped__.__code__


def test_y_lives_no_longer_than_it_did():
    alive = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.seen = None

        def look(self, y):
            self.seen = weakref.ref(y)
            return y * 2.0

        def note(self, y):
            alive.append(self.seen() is not None)
            return y

        def forward(self, x):
            h = x + x
            z = self.look(self.norm(h))
            return self.note(z)

    m = Watched()
    with torch.no_grad():
        m(rows())
        assert fused_calls(fused(m), rows()) == 1
    assert alive == [False, False]


# ------------------------------------------------------------------------- what is done with models


def test_a_fused_layer_is_what_it_was_to_everybody_else():
    m = made(Block)
    before = (repr(m), list(m.state_dict()), vars(m).keys())
    fused(m)
    assert (repr(m), list(m.state_dict()), vars(m).keys()) == before
    assert isinstance(m, Block)
    assert [getattr(type(m), n) for n in ("__name__", "__qualname__", "__module__", "__doc__")] == [
        getattr(Block, n) for n in ("__name__", "__qualname__", "__module__", "__doc__")
    ]
    assert type(fused(made(Block))) is type(m)


def test_a_revert_is_exact_and_copies_have_their_own():
    m, x = made(Block), rows()
    expected = m(x)
    report = normkit.convert(m, fuse="layer")
    other = copy.deepcopy(m)
    report.revert()
    assert type(m) is Block
    assert torch.equal(m(x), expected)
    assert fused_calls(other, x) == 1
    normkit.revert(other)
    assert type(other) is Block
    assert type(other.post_norm) is LlamaRMSNorm


def test_a_pickle_has_the_original_class():
    m = fused(made(Block))
    data = pickle.dumps(m)
    assert b"normkit" not in data
    assert type(pickle.loads(data)) is Block


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torch_compile_export_and_trace_see_the_graph_of_before():
    m, x = made(Block), rows()
    forward = Block.forward.__wrapped__

    def targets(module):
        graph = torch.export.export(module, (x,)).graph
        return [node.target for node in graph.nodes if node.op == "call_function"]

    expected, y = targets(m), m(x)
    fused(m)
    assert targets(m) == expected
    compiled = torch.compile(m, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), forward(made(Block), x))
    assert torch.equal(torch.jit.trace(m, (x,))(x), y)


# ---------------------------------------------------------------- what stays apart, at run time


def hooked(m):
    m.post_norm.register_forward_hook(lambda *_: None)


def wrapped(m):
    own = m.post_norm.forward
    m.post_norm.forward = lambda x: own(x)


def replaced(m):
    m.post_norm = nn.Identity()


def parametrised(m):
    nn.utils.parametrize.register_parametrization(m.post_norm, "weight", nn.Identity())


def reverted(m):
    normkit.revert(m.post_norm)


@pytest.mark.parametrize("change", [hooked, wrapped, replaced, parametrised, reverted])
def test_a_norm_that_does_more_now_is_called_as_it_is(change):
    m, plain, x = fused(made(Block)), made(Block), rows()
    change(m)
    if change is replaced:
        change(plain)
    assert fused_calls(m, x) == 0
    assert torch.allclose(m(x), plain(x), atol=1e-5)


def test_a_hook_for_all_modules_sees_the_norm():
    m, seen = fused(made(Block)), []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        m(rows())
    finally:
        hook.remove()
    assert type(m.post_norm) in seen
    assert fused_calls(m, rows()) == 1


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)

    def forward(self, a, b):
        h = a + b
        return self.norm(h), h


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (rows(), rows(F32, 1, 1, 64)),
        (rows(), rows(F32, 2, 5, 1)),
        (rows(), 1.0),
        (2, rows()),
        (rows(), rows(BF16)),
        (rows(F32, 5, 2, 64).transpose(0, 1), rows()),
        (rows(), rows(F32, 2, 64, 5).transpose(1, 2)),
        (rows(), rows().as_subclass(type("Marked", (Tensor,), {}))),
        (rows(F32, 3, 64), rows(F32, 3, 64).double()),
    ],
    ids=["rows", "columns", "number", "number first", "dtypes", "strides", "strides of x",
         "subclass", "float64"],
)  # fmt: skip
def test_sums_that_are_no_plain_ones_are_made_as_before(a, b):
    m = Adds()
    normkit.convert(m)
    try:
        expected = m(a, b)
    except (RuntimeError, ValueError, TypeError) as error:
        with pytest.raises(type(error)):
            fused(m)(a, b)
        return
    fused(m)
    assert fused_calls(m, a, b) == 0
    for mine, theirs in zip(m(a, b), expected, strict=True):
        assert torch.equal(mine, theirs)
        assert (mine.stride(), mine.dtype, type(mine)) == (
            theirs.stride(),
            theirs.dtype,
            type(theirs),
        )


def test_a_tensor_may_be_added_to_itself_and_none_is_written():
    m, x = fused(Adds()), rows()
    kept = x.clone()
    y, h = m(x, x)
    assert torch.equal(x, kept)
    assert torch.equal(h, x + x)
    assert h.data_ptr() != x.data_ptr()
    assert near(y, nn.LayerNorm(64)(x + x))


def test_under_autocast_and_vmap_nothing_is_fused():
    m, x = fused(Adds()), rows()
    with torch.autocast("cpu", BF16):
        assert fused_calls(m, x, x) == 0
    y, _ = torch.func.vmap(m)(x, x)
    assert torch.allclose(y, m(x, x)[0], atol=1e-5)


# ------------------------------------------------------------ what is not rewritten, and the reason


class NotFirst(Adds):
    """Something is computed between the sum and the norm, or at another time."""

    def forward(self, a, b):
        h = a + b
        h.mul_(2.0)
        y = self.norm(h)
        h = a + b
        later = lambda: self.norm(h)  # noqa: E731
        z = torch.relu(b) + self.norm(h)
        h = a - b
        w = self.norm(h)
        h = a + b
        w = w + (self.norm(h) if b is None else later())
        each = [self.norm(t) for t in (h, h)]
        return y + z + w + each[0]


def test_where_the_norm_is_not_the_first_thing_behind_its_sum_all_stays():
    m = NotFirst()
    report = normkit.convert(m, fuse="layer")
    assert report.layers == []
    assert type(m) is NotFirst
    assert "fused" not in str(report)


class Rebinds(Adds):
    def forward(self, a, b):
        self = copy.copy(self)
        h = a + b
        return self.norm(h)


def test_a_method_that_gives_self_another_meaning_stays():
    assert normkit.convert(Rebinds(), fuse="layer").layers == []


def reason_for(m: nn.Module) -> str:
    (layer,) = normkit.convert(m, fuse="layer").layers
    assert layer.norms == ()
    return layer.reason


def test_what_cannot_be_read_is_left_with_the_reason(monkeypatch):
    space = {"Adds": Adds}
    exec(
        "class Unknown(Adds):\n    def forward(self, a, b):\n        return self.norm(a + b)", space
    )
    assert reason_for(space["Unknown"]()) == "the source of its forward is not known"

    m = made(Block)
    m.forward = functools.partial(Block.forward, m)
    assert reason_for(m) == "forward is replaced on the instance"

    def hidden(function):
        held = [function]
        return functools.wraps(function)(lambda self, *args: held[0](self, *args))

    class Hidden(Adds):
        forward = hidden(Adds.forward)

    assert reason_for(Hidden()) == "its forward is decorated in an unknown way"


def test_a_file_that_changed_since_it_was_loaded_is_not_believed(monkeypatch, tmp_path):
    text = (
        "from torch import nn\n"
        "class Changed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm = nn.LayerNorm(64)\n"
        "    def forward(self, a, b):\n"
        "        h = a + b\n"
        "        return self.norm(h)\n"
    )
    file = tmp_path / "changed.py"
    file.write_text(text)
    space = {"__name__": __name__}
    exec(compile(text, str(file), "exec"), space)
    monkeypatch.setitem(globals(), "Changed", space["Changed"])
    assert normkit.convert(space["Changed"](), fuse="layer").layers[0].norms == ("norm",)
    file.write_text(text.replace("a + b", "a + b + b"))
    linecache.checkcache(str(file))
    assert "what its file says is other code" in reason_for(space["Changed"]())


# --------------------------------------------------------------------------------------- the report


def test_the_report_says_what_is_fused():
    m = nn.Sequential(made(Block), made(Block), made(PostNorm))
    dry = normkit.convert(m, fuse="layer", dry_run=True)
    report = normkit.convert(m, fuse="layer")
    assert report.layers == dry.layers
    lines = str(report).splitlines()
    assert lines[0] == "5 of 5 norms converted, 3 of them fused with the sum before"
    assert str(dry).splitlines()[0].startswith("5 of 5 norms would be converted, 3 of them")
    assert [line.split() for line in lines if line.startswith("fused")] == [
        ["fused", "2", "Block", "sums", "before", "post_norm", "0"],
        ["fused", "1", "PostNorm", "sums", "before", "LayerNorm", "2"],
    ]
    assert json.loads(report.to_json())["layers"][0] == {
        "path": "0", "cls": "Block", "norms": ["post_norm"], "reason": "", "modulated": []
    }  # fmt: skip


def test_a_norm_that_is_not_selected_is_not_fused():
    m = nn.Sequential(made(Block), made(PostNorm))
    report = normkit.convert(m, fuse="layer", exclude="*.post_norm")
    assert [layer.path for layer in report.layers] == ["1"]
