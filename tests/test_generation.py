"""Generation: the tokens of transformers and of the network without a cache, whatever batch, mesh or padding."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
import torch
import weights_folder
from jax.sharding import AxisType, NamedSharding
from test_model import GROUPED, build, params_of, peer
from transformers import LlamaForCausalLM

from panda_jax import sharding
from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.generation import decode
from panda_jax.generation.decode import Generated, Generator
from panda_jax.generation.sampling import Sampling
from panda_jax.model.parameters import Parameters
from panda_jax.text.tokenizer import Tokenizer

# V, D, L, N, K, F and H all differ; V and K are even, so that two devices can share them.
MODEL = replace(GROUPED, vocab_size=98, context_length=96)
TIED = replace(MODEL, tie_embeddings=True, norm_eps=1e-2, rope_theta=500.0)
COMPUTE = Compute(dtype="float32", layer_loop="scan", attention_block=24)
# Buckets of 16 and 32, their edges, one token alone, and more prompts than rows in a batch. Programs are what costs
# time here, so the tests share them: the same rows, the same buckets, few kinds of choice.
LENGTHS = (5, 16, 17, 1, 29, 11, 32, 3)
SHORT = (0, 1, 3, 5)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, MODEL.vocab_size, length).tolist() for length in lengths]


def flat(model: Model) -> dict[str, jax.Array]:
    params = params_of(model)
    layers = {f"layers.{name}": value for name, value in params["layers"].items()}
    return {name: value for name, value in params.items() if name != "layers"} | layers


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@cache
def generator(
    model: Model = MODEL, layer_loop: Any = "scan", mesh_shape: tuple[int, int, int] = (1, 1, 1)
) -> Generator:
    """Return a generator of 4 rows a batch, the parameters laid out as training lays them out."""
    mesh, axes = mesh_of(*mesh_shape), Parameters(model).axes
    place = {name: NamedSharding(mesh, sharding.parameter_spec(axes[name], True)) for name in axes}
    made = Generator(model, jax.device_put(flat(model), place), replace(COMPUTE, layer_loop=layer_loop), mesh)
    made.batch_size = 4
    return made


def drawing(**changes: Any) -> Sampling:
    """Return a sampling without any cut or penalty, and without an end."""
    plain = Sampling(12, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=3, stop_ids=())
    return replace(plain, **changes)


def greedy(max_new_tokens: int = 12, stop_ids: tuple[int, ...] = ()) -> Sampling:
    return Sampling.greedy(max_new_tokens, stop_ids)


def peer_tokens(model: Model, prompt: list[int], **options: Any) -> list[int]:
    """Return what transformers' generate writes after one prompt."""
    network, given = cast(Any, peer(model)), torch.tensor([prompt])
    with torch.inference_mode():
        # LlamaConfig's own eos is 2; no row has this one.
        out = network.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, pad_token_id=0, eos_token_id=10**6, **options
        )
    return out[0, len(prompt) :].tolist()


def peer_logprobs(model: Model, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Return transformers' log-probabilities of `ids` behind `prompt`, one forward pass over the whole row."""
    with torch.inference_mode():
        logits = peer(model)(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[torch.arange(len(ids)), ids].numpy()


@pytest.mark.parametrize(
    ("model", "layer_loop"), [pytest.param(MODEL, "scan", id="untied"), pytest.param(TIED, "unroll", id="tied")]
)
def test_greedy_tokens_equal_transformers_on_ragged_prompts(model: Model, layer_loop: str):
    given = prompts() if model is MODEL else [prompts()[number] for number in SHORT]
    found = generator(model, layer_loop).generate(given, greedy())
    for prompt, row in zip(given, found, strict=True):
        assert row.ids == peer_tokens(model, prompt, max_new_tokens=12)
        assert not row.stopped
        np.testing.assert_allclose(row.logprobs, peer_logprobs(model, prompt, row.ids), atol=2e-5)


def test_the_penalty_sees_prompt_and_answer_as_in_transformers():
    """And no padding: below 1 the penalty favours what is there already, so a falsely seen id would be written."""
    given = [prompts()[number] for number in SHORT]
    plain = generator().generate(given, greedy())
    for penalty in (1.7, 0.2):
        found = generator().generate(given, replace(greedy(), repetition_penalty=penalty))
        for prompt, row in zip(given, found, strict=True):
            assert row.ids == peer_tokens(MODEL, prompt, max_new_tokens=12, repetition_penalty=penalty)
            np.testing.assert_allclose(row.logprobs, peer_logprobs(MODEL, prompt, row.ids), atol=2e-5)
        assert found != plain


def test_cached_steps_equal_the_whole_forward_pass():
    """Each token is the argmax of Llama.hidden over all that stands before it; a drawn one has its log-probability."""
    network = build(MODEL, params_of(MODEL))

    @jax.jit
    def logprobs(tokens: jax.Array) -> jax.Array:
        ones = jnp.ones_like(tokens)
        hidden = network.hidden(tokens, ones, jnp.cumsum(ones, axis=1) - 1, COMPUTE)
        return jax.nn.log_softmax(network.logits(hidden))

    for choice in (greedy(), drawing(top_k=60, top_p=0.99)):
        given = [prompts()[number] for number in SHORT]
        for prompt, row in zip(given, generator().generate(given, choice), strict=True):
            # Behind the row stands something else, which its tokens cannot see: one shape for all rows.
            tokens = np.full((1, 48), 7)
            tokens[0, : len(prompt) + 12] = prompt + row.ids
            whole = np.asarray(logprobs(jnp.asarray(tokens)))[0, len(prompt) - 1 : len(prompt) + 11]
            if choice.temperature == 0:
                assert row.ids == whole.argmax(1).tolist()
            np.testing.assert_allclose(row.logprobs, whole[np.arange(12), row.ids], atol=2e-5)


def test_companions_and_their_order_change_nothing():
    """Bit for bit, with companions of other content and length, in another row of the batch."""
    together = generator().generate(prompts(), greedy())
    others = prompts(seed=9, lengths=(8, 2, 30, 14, 22, 1))
    for number in (0, 4, 7):
        mixed = [*others[:3], prompts()[number], *others[3:]]
        assert generator().generate(mixed, greedy())[3] == together[number]
    assert generator().generate(prompts()[::-1], greedy()) == together[::-1]


def test_batch_size_changes_no_draw():
    choice = drawing(temperature=0.8, top_k=20, top_p=0.9)
    given = [prompts()[number] for number in SHORT]
    expected = generator().generate(given, choice)
    other = Generator(MODEL, flat(MODEL), COMPUTE, mesh_of(1, 1, 1))
    other.batch_size = 1
    assert [row.ids for row in other.generate(given, choice)] == [row.ids for row in expected]
    alone = generator().generate(given[:1], choice)
    assert alone[0].ids == expected[0].ids


def test_a_draw_belongs_to_seed_and_place():
    """The same prompt at another place, or another seed, draws otherwise; the same again draws the same."""
    same = [prompts()[0]] * 5
    choice = drawing(top_k=50)
    found = [tuple(row.ids) for row in generator().generate(same, choice)]
    assert len(set(found)) == 5
    assert [tuple(row.ids) for row in generator().generate(same, choice)] == found
    assert not set(found) & {tuple(row.ids) for row in generator().generate(same, replace(choice, seed=4))}


def test_a_mesh_gives_the_same_tokens_and_draws():
    """Eight devices: rows over data and fsdp, heads, slots and vocabulary over tensor, parameters over fsdp."""
    given, many = [prompts()[number] for number in SHORT], generator(MODEL, "unroll", (2, 2, 2))
    choice = drawing(top_k=50, top_p=0.9)
    expected = generator().generate(given, choice)
    for row, other in zip(many.generate(given, replace(choice, max_new_tokens=5)), expected, strict=True):
        assert row.ids == other.ids[:5]
        np.testing.assert_allclose(row.logprobs, other.logprobs[:5], atol=2e-5)


def test_nothing_is_compiled_for_other_lengths_in_the_same_buckets():
    generator().generate(prompts(), greedy())
    before = decode.num_programs()
    assert before > 0
    lengths = (2, 30, 20, 9, 15, 4, 12, 7)  # 4 + 2 and 2 rows, where those before were 4 + 1 and 3
    for choice in (greedy(), greedy(9), greedy(16, stop_ids=(4, 5))):
        generator().generate(prompts(1, lengths), choice)
    assert decode.num_programs() == before


def test_a_row_ends_with_its_stop_id_and_the_others_go_on():
    free = generator().generate(prompts(), greedy(16))[:6]
    stop = free[0].ids[7]
    ends = [row.ids.index(stop) if stop in row.ids else 16 for row in free]
    assert ends[0] <= 7 and len(set(ends)) > 1
    found = generator().generate(prompts()[:6], greedy(16, stop_ids=(stop, 97)))
    for row, whole in zip(found, free, strict=True):
        end = min(whole.ids.index(i) if i in whole.ids else 16 for i in (stop, 97))
        assert row == Generated(whole.ids[:end], whole.logprobs[:end], end < 16)


def test_a_stop_id_may_come_first_or_last():
    free = generator().generate(prompts(), greedy(3))
    first = generator().generate(prompts(), greedy(3, stop_ids=(free[2].ids[0],)))[2]
    assert first == Generated([], [], True)
    unseen = [number for number, row in enumerate(free) if row.ids[2] not in row.ids[:2]][0]
    last = generator().generate(prompts(), greedy(3, stop_ids=(free[unseen].ids[2],)))[unseen]
    assert (last.ids, last.stopped) == (free[unseen].ids[:2], True)


def test_a_stream_yields_what_generate_returns():
    choice = drawing(top_k=50)
    whole = generator().generate(prompts()[:1], choice)[0]
    pairs = list(generator().stream(prompts()[0], choice))
    assert [new for new, _ in pairs] == whole.ids
    np.testing.assert_allclose([logprob for _, logprob in pairs], whole.logprobs, atol=1e-6)
    stopped = list(generator().stream(prompts()[0], replace(choice, stop_ids=(whole.ids[4],))))
    assert [new for new, _ in stopped] == whole.ids[: whole.ids.index(whole.ids[4])]


def test_the_whole_context_can_be_used_and_no_more():
    long = prompts(5, (90,))
    before = decode.num_programs()
    found = generator().generate(long, greedy(6))[0]
    assert decode.num_programs() > before  # no other test has a prompt of this bucket
    assert found.ids == peer_tokens(MODEL, long[0], max_new_tokens=6)
    with pytest.raises(InputError, match=r"prompt 0: 90 ids and max_new_tokens 7 exceed .* 96; .* at most 6"):
        generator().generate(long, greedy(7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [([[]], "prompt 0 is empty"), ([[3], [3, 98]], "prompt 1: id 98, expected 0 to 97"), ([[-1]], "id -1, expected")],
)
def test_prompts_that_cannot_be_continued(wrong: list[list[int]], message: str):
    with pytest.raises(InputError, match=message):
        generator().generate(wrong, greedy())
    with pytest.raises(InputError, match=message.replace("prompt 1", "prompt 0")):
        list(generator().stream(wrong[-1], greedy()))


def test_broken_weights_write_nothing():
    parameters = flat(MODEL) | {"norm": jnp.full_like(flat(MODEL)["norm"], jnp.nan)}
    broken = Generator(MODEL, parameters, COMPUTE, mesh_of(1, 1, 1))
    broken.batch_size = 4  # the programs of the others
    with pytest.raises(InputError, match="prompt 0: a log-probability is not finite; the weights are broken"):
        broken.generate([[1, 2]], greedy())


def test_no_prompts_give_no_texts():
    assert generator().generate([], greedy()) == []


def test_a_stop_id_outside_the_vocabulary():
    with pytest.raises(InputError, match="stop_ids: id 98, expected 0 to 97"):
        generator().generate([[1]], greedy(2, stop_ids=(98,)))


def test_stories_are_told_as_transformers_tells_them(shared_data: Path, tmp_path: Path):
    """The real 260K-parameter model; from BOS it begins with the sentence quoted beside the weights."""
    folder = shared_data / "weights" / "stories260K-meta"
    quoted = re.search(r"stories260K-meta/.*?begins \"(.*?)\"", (shared_data / "README.md").read_text(encoding="utf-8"))
    assert quoted and len(quoted[1]) > 100
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    says = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    model = Model(
        vocab_size=512, dim=64, num_layers=5, num_heads=8, num_kv_heads=4, norm_eps=says["norm_eps"],
        mlp_dim=len(state["layers.0.feed_forward.w1.weight"]), context_length=512,
    )  # fmt: skip
    tensors = test_parity.stored_arrays(model, {name: tensor.numpy() for name, tensor in state.items()})
    exported = test_parity.write_huggingface(tmp_path, model, tensors)
    network: Any = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    given = [[1], *([1, *tokenizer.encode(text)] for text in ("Tim saw a red", "One day, Lily and her mom went"))]
    parameters = {name: jnp.asarray(value) for name, value in weights_folder.in_model_layout(tensors, model).items()}
    found = Generator(model, parameters, COMPUTE, mesh_of(1, 1, 1)).generate(given, greedy(60))
    for prompt, row in zip(given, found, strict=True):
        ids = torch.tensor([prompt])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        assert row.ids == out[0, len(prompt) :].tolist()
    assert quoted[1].startswith(tokenizer.decode(found[0].ids)[: len(quoted[1])])
