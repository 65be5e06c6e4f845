"""What XLA makes of the real prefill and decode steps for an H200, on a machine without one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxengine.config import ModelConfig
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel
from jaxengine.nn.attention import ForwardContext
from jaxengine.runtime import weights
from jaxengine.runtime.decode_loop import SamplerSteps
from jaxengine.runtime.forward import Forward
from jaxengine.runtime.program_factory import ProgramFactory
from jaxengine.runtime.programs import ProgramKey, ProgramSpec
from jaxengine.runtime.sharding import make_mesh
from jaxengine.runtime.slots import slot_layout
from jaxengine.sampling import (
    LogitsTransform,
    Param,
    Sampler,
    chain,
    default_sampler,
    dry,
    mirostat_v2,
    temperature,
    top_k_top_p_min_p,
    typical,
    when,
)
from jaxengine.scheduler.buckets import Buckets
from tests import deviceless

pytestmark = [pytest.mark.deviceless, pytest.mark.timeout(400)]

NUM_LAYERS = 3
NUM_PAGES = 4096
PAGES_PER_SEQUENCE = 2048
MIB = 1 << 20
# Qwen2.5-0.5B, but for its depth: layers are unrolled and alike.
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_layers=NUM_LAYERS,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    tie_word_embeddings=True,
    max_position_embeddings=16 * PAGES_PER_SEQUENCE,
)


MESH = functools.cache(lambda: make_mesh(list(deviceless.mesh().devices.flat)))


def bound(sampler: Sampler, size: int) -> tuple[ProgramFactory, SamplerSteps]:
    model = BoundModel(MODELS[CONFIG.architecture], CONFIG, jnp.dtype(jnp.bfloat16))
    buckets = Buckets(
        decode_rows=(size,),
        prefill_tokens=(size,),
        num_slots=64,
        page_size=16,
        max_window_steps=32,
    )
    forward = Forward(
        model=model,
        layout=slot_layout(PAGES_PER_SEQUENCE),
        buckets=buckets,
        ctx=ForwardContext(mesh=MESH(), kernels="triton"),
        num_top=20,
    )
    kv_dtype = jnp.dtype(jnp.bfloat16)
    factory = ProgramFactory(forward, weights.place(model, MESH()), MESH(), NUM_PAGES, kv_dtype)
    return factory, SamplerSteps.bind(forward, sampler)


def compiled(spec: ProgramSpec, **options: str) -> jax.stages.Compiled:
    with jax.sharding.use_abstract_mesh(MESH().abstract_mesh):
        return spec.lower().compile({**spec.options, **options})


@pytest.fixture(scope="module", autouse=True)
def gpu_is_the_default():
    """Ops that are told nothing else choose by the default backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        yield


STEPS = [("decode", 1), ("decode", 64), ("prefill", 1024)]


@pytest.fixture(scope="module", params=STEPS, ids=lambda p: f"{p[0]}-{p[1]}")
def step(request, tmp_path_factory):
    dump = tmp_path_factory.mktemp(request.param[0])
    kind, size = request.param
    factory, steps = bound(default_sampler(), size)
    spec = factory.fused(steps, is_cached=True)[ProgramKey(kind, size)]
    return request.param, compiled(spec, xla_dump_to=str(dump)), dump


def test_kv_cache_is_aliased_and_nothing_large_is_copied(step):
    _, program, _ = step
    kv_bytes = NUM_LAYERS * NUM_PAGES * 2 * 2 * 16 * 64 * 2
    assert program.memory_analysis().alias_size_in_bytes >= kv_bytes
    assert deviceless.large_copies(program, min_elements=MIB // 4) == []


def compiled_draw(sampler: Sampler, kind: str) -> jax.stages.Compiled:
    """Of 64 rows, in split form, by a sampler that a call brings along."""
    factory, steps = bound(sampler, 64)
    owner = steps.owner + 1
    specs = factory.split(dataclasses.replace(steps, owner=owner))
    return compiled(specs[ProgramKey(kind, 64, owner)])


def test_a_sampler_of_a_call_copies_and_sorts_no_logits():
    sampler = Sampler(chain(dry(), temperature(), top_k_top_p_min_p(), typical(), mirostat_v2()))
    program = compiled_draw(sampler, "draw_lists")
    assert deviceless.large_copies(program, min_elements=MIB // 4) == []
    sorts = [line for line in (program.as_text() or "").splitlines() if " sort(" in line]
    assert not [line for line in sorts if str(CONFIG.vocab_size) in line]


def notebook_mirostat() -> LogitsTransform:
    """As a user writes it: three passes over the logits before the draw's own."""

    def apply(logits, mu, ctx):
        bits = -jax.nn.log_softmax(logits) / jnp.log(2)
        is_kept = (bits <= mu[:, None]) | (bits == bits.min(-1, keepdims=True))
        return jnp.where(is_kept, logits, -jnp.inf)

    def update(mu, drawn, ctx):
        return mu - ctx.eta * (-drawn.raw_logprob / jnp.log(2) - ctx.tau)

    values = {"tau": Param("float32", 0.0), "eta": Param("float32", 0.1)}
    transform = LogitsTransform(apply, lambda ctx: 2 * ctx.tau, update, values)
    return when(lambda ctx: ctx.tau > 0, transform)


def test_a_users_transform_is_fused_into_the_draw():
    program = compiled_draw(Sampler(chain(temperature(), notebook_mirostat())), "draw")
    # Perhaps one of several results.
    is_made = rf"  %?\S+ = [^=]*\[64,{CONFIG.vocab_size}\][^=]* (fusion|copy|custom-call)\("
    assert not [x for x in (program.as_text() or "").splitlines() if re.match(is_made, x)]


def test_every_layer_calls_the_kernel_and_none_gathers_a_sequence(step):
    (_, size), program, _ = step
    text = program.as_text()
    calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
    in_layers = [line for line in calls if "/sample/" not in line]
    # At one row a layer is nothing but kernels: attention, and four products with all between. At
    # 64 three of the products are, one in parts, and their sum with its norm. A prefill writes the
    # new tokens and attends.
    assert len(in_layers) == NUM_LAYERS * {1: 5, 64: 5, 1024: 2}[size]
    for op in ("filter_threshold_collect", "top_k"):
        assert any(f"/{op}/" in line for line in calls)
    gathered = re.findall(r"bf16\[([\d,]+)\]\S* gather\(", text)
    longest = max((eval(shape.replace(",", "*")) for shape in gathered), default=0)
    assert longest <= size * CONFIG.hidden_size, "more than the embeddings was gathered"


def test_little_stands_around_the_layers_of_a_single_row(step):
    """Every kernel of a step costs about two microseconds, however little it does."""
    (kind, size), program, _ = step
    if (kind, size) != ("decode", 1):
        pytest.skip("with more rows these kernels weigh less")
    text = program.as_text() or ""
    bodies = {text[text.index(f"\n%{name} ") :] for name in re.findall(r"body=%([\w.\-]+)", text)}
    body = max((body[: body.index("\n}")] for body in bodies), key=len)
    kernels = re.findall(r"  %(\S+) = .* (?:fusion|custom-call|copy|conditional)\(.*", body)
    around = [name for name in kernels if not name.startswith("pallas_call")]
    assert len(around) <= 17, around


def test_temperature_and_filters_write_nothing_of_the_logits_size(step):
    """On their routes kernels take the model's logits as they lie."""
    (kind, size), program, _ = step
    if kind != "decode":
        pytest.skip("a prefill has as many rows as prompts may end in it")
    lines = (program.as_text() or "").splitlines()
    on_routes = [x for x in lines if re.search(r"/sample/cond/branch_[12]_fun/", x)]
    assert any("/block_kept/" in x for x in on_routes)
    # Inside of a fusion anything may have this shape: it lies in registers.
    is_made = rf"  %?\S+ = \(?f32\[{size},{CONFIG.vocab_size}\]\S* (fusion|copy|custom-call)\("
    assert not [x for x in on_routes if re.match(is_made, x)]


def test_a_decode_window_is_one_command_buffer(step):
    (kind, _), _, dump = step
    if kind != "decode":
        pytest.skip("a prefill has no loop")
    (thunks,) = dump.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = thunks.read_text().splitlines()
    outermost = [line for line in lines if re.match(r"\d+: ", line)]
    assert len(outermost) == 1 and "kCommandBuffer" in outermost[0]
    assert any("kWhile" in line for line in lines)
