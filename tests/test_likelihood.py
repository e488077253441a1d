"""Log-probabilities of options against torch, one option at a time; and what must not change them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import foreign
import jax
import numpy as np
import pytest
import sentencepiece
import spelled_models
import torch
import weights_folder
from jax.sharding import AxisType, NamedSharding
from transformers import LlamaConfig, LlamaForCausalLM

from convert.sources import open_any
from panda_jax import sharding
from panda_jax.config import Compute, Model
from panda_jax.errors import InputError
from panda_jax.evaluation import rows
from panda_jax.evaluation.likelihood import PORTIONS, ChoiceScores, Scorer
from panda_jax.model.parameters import Parameters
from panda_jax.text.tokenizer import Tokenizer

COMPUTE = Compute(dtype="float32", attention_block=32, loss_chunk_tokens=24, compilation_cache_dir=None)
# Even, so that two devices can share it; the tokenizer has fewer pieces.
SIZE = foreign.Size(48, 6, 2, 132, {"multiple_of": 44}, vocab_size=282, context_length=120)
PIECES = [("天地", -1.0), ("：天", -2.0), ("▁玄", -3.0), ("▁▁", -4.0), *spelled_models.singles("▁天地玄黄宇宙：")]


@dataclass(frozen=True)
class Asked:
    context: str
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """One model, here and in torch."""

    model: Model
    arrays: dict[str, np.ndarray]
    network: LlamaForCausalLM
    tokenizer_model: bytes

    def scorer(self, mesh: jax.sharding.Mesh, compute: Compute = COMPUTE) -> Scorer:
        axes = Parameters(self.model).axes
        laid = {
            name: jax.device_put(value, NamedSharding(mesh, sharding.parameter_spec(axes[name], True)))
            for name, value in self.arrays.items()
        }
        return Scorer(self.model, laid, compute, mesh, Tokenizer(self.tokenizer_model, "test"))

    def oracle(self, context: str, continuation: str) -> tuple[float, bool]:
        """PROTOCOLS.md §5.3 in torch, for one option."""
        space = context[len(context.rstrip()) :]
        context, continuation = context.rstrip(), space + continuation
        processor = sentencepiece.SentencePieceProcessor(model_proto=self.tokenizer_model)
        before = processor.encode(context, add_bos=True)
        scored = processor.encode(context + continuation, add_bos=True)[len(before) :]
        return self.oracle_of_tokens(before, scored)

    def oracle_of_tokens(self, before: list[int], scored: list[int]) -> tuple[float, bool]:
        tokens = (before + scored)[-(self.model.context_length + 1) :]
        with torch.no_grad():
            table = self.network(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)[-len(scored) :]
        value = table[torch.arange(len(scored)), torch.tensor(scored)].sum()
        return float(value), table.argmax(-1).tolist() == scored


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor]
    return jax.make_mesh((data, fsdp, tensor), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def answers(scorer: Scorer, asked: Sequence[Asked]) -> list[ChoiceScores]:
    found = dict(scorer.score(asked))
    assert sorted(found) == list(range(len(asked)))
    return [found[number] for number in range(len(asked))]


def subject(model: Model, tensors: dict[str, np.ndarray], tokenizer_model: bytes) -> Subject:
    """`tensors` are named as we name them, one per layer, [out, in]."""
    config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.dim, intermediate_size=model.mlp_dim,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps, tie_word_embeddings=model.tie_embeddings,
        rope_parameters={"rope_theta": model.rope_theta, "rope_type": "default"},
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval()
    state = {
        name: torch.from_numpy(tensors[foreign.names(name)[0]].copy())
        for name in network.state_dict() if foreign.names(name)[0] in tensors
    }  # fmt: skip
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"])
    network.tie_weights()
    return Subject(model, weights_folder.in_model_layout(tensors, model), network, tokenizer_model)


@pytest.fixture(scope="module")
def tiny() -> Subject:
    state = foreign.random_state(SIZE, torch.float32)
    model = Model(
        vocab_size=SIZE.vocab_size, dim=SIZE.dim, num_layers=SIZE.num_layers, num_heads=SIZE.num_heads,
        num_kv_heads=SIZE.num_kv_heads, mlp_dim=SIZE.mlp_dim, norm_eps=SIZE.norm_eps, rope_theta=SIZE.rope_theta,
        context_length=SIZE.context_length,
    )  # fmt: skip
    tensors = {foreign.names(name)[0]: tensor.numpy() for name, tensor in state.items()}
    return subject(model, tensors, spelled_models.spell(PIECES))


@pytest.fixture(scope="module")
def one_device(tiny: Subject) -> Scorer:
    return tiny.scorer(mesh_of(1, 1, 1))


ASKED = [
    Asked("天地玄黄", ("宇宙", "宙宇宇", "黄", "天地天地玄", "玄")),
    Asked("问：玄黄？答：", (" 天地", " ab", " 宙宙宙宙宙宙", " 地")),
    Asked("white space goes over  \n", ("天", "地地 ", "  玄")),
    Asked("全角空格\u3000", ("天", "地")),
    Asked("", ("天地玄黄", " 宇", "x")),
    Asked(" \n ", ("天地", "宇")),
    Asked("宇宙：", ("天地", "地天")),  # "：天" is one piece: the context keeps its colon all the same
    Asked("天", ("宇", "宙", "宇宙")),
    Asked("玄" * 117, ("宇", "宙宇宙宇宙", "地天", "黄宇", "天地宇宙玄黄")),  # 118 ids with BOS; 1 to 5 too many
    Asked("黄宇" * 100, ("地玄", "宙")),
    Asked(
        "天宙" * 20, tuple("宇" * n + "玄宙" * (n % 5) for n in range(1, 20))
    ),  # more options than a row has room for
    Asked("宙" * 60, ("宇" * 50, "玄" * 40, "黄" * 30)),  # together longer than the longest row
]


def test_every_option_scores_as_torch_scores_it_alone(tiny: Subject, one_device: Scorer) -> None:
    for asked, scores in zip(ASKED, answers(one_device, ASKED), strict=True):
        expected = [tiny.oracle(asked.context, continuation) for continuation in asked.continuations]
        np.testing.assert_allclose(scores.loglikelihoods, [value for value, _ in expected], rtol=0, atol=1e-4)
        assert list(scores.is_greedy) == [is_greedy for _, is_greedy in expected]


def test_truncated_contexts_are_counted(one_device: Scorer) -> None:
    """118 ids of context and n of continuation against 120 + 1 that fit: n = 1, 2 and 3 do; 5, 6 do not."""
    lengths = [len(option.continuation) for option in rows.encode(ASKED[8:9], one_device._tokenizer)[0]]
    assert lengths == [1, 5, 2, 2, 5]
    assert [scores.num_truncated for scores in answers(one_device, ASKED)] == [0] * 8 + [2, 2, 0, 0]


def test_what_the_model_would_write_is_greedy(tiny: Subject, one_device: Scorer) -> None:
    before = [1, 5, 9, 200]
    written: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            written.append(int(tiny.network(torch.tensor([before + written])).logits[0, -1].argmax()))
    other = [*written[:3], (written[3] + 1) % 282]
    first = [(written[0] + 1) % 282]
    options = [rows.Option(before, ending) for ending in (written, other, written[:1], first)]
    ((_, scores),) = one_device.score_tokens([options])
    assert scores.is_greedy == (True, False, True, False)
    expected = [tiny.oracle_of_tokens(before, option.continuation)[0] for option in options]
    np.testing.assert_allclose(scores.loglikelihoods, expected, rtol=0, atol=1e-4)


def test_of_equally_likely_tokens_the_first_is_the_greedy_one(tiny: Subject) -> None:
    flat = replace(tiny, arrays=tiny.arrays | {"lm_head": np.zeros_like(tiny.arrays["lm_head"])})
    options = [rows.Option([1, 7], ending) for ending in ([0, 0], [0, 3], [3])]
    ((_, scores),) = flat.scorer(mesh_of(1, 1, 1)).score_tokens([options])
    assert scores.is_greedy == (True, False, False)
    np.testing.assert_allclose(scores.loglikelihoods, -np.log(282) * np.array([2, 2, 1]), rtol=1e-6)


def test_a_shared_prefix_scores_as_rows_of_their_own(one_device: Scorer) -> None:
    alone = [Asked(asked.context, (ending,)) for asked in ASKED for ending in asked.continuations]
    together = [value for scores in answers(one_device, ASKED) for value in scores.loglikelihoods]
    apart = [scores.loglikelihoods[0] for scores in answers(one_device, alone)]
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5)


def test_a_mesh_scores_as_one_device(tiny: Subject, one_device: Scorer) -> None:
    expected = answers(one_device, ASKED)
    for scores, alone in zip(answers(tiny.scorer(mesh_of(2, 2, 2)), ASKED), expected, strict=True):
        np.testing.assert_allclose(scores.loglikelihoods, alone.loglikelihoods, rtol=0, atol=1e-5)
        assert scores.is_greedy == alone.is_greedy and scores.num_truncated == alone.num_truncated


def test_neither_order_nor_company_changes_a_bit(one_device: Scorer) -> None:
    expected = answers(one_device, ASKED)
    places = list(range(len(ASKED)))
    for seed in range(3):
        random.Random(seed).shuffle(places)
        assert answers(one_device, [ASKED[place] for place in places]) == [expected[place] for place in places]
    assert answers(one_device, ASKED[4:9]) == expected[4:9]


def test_programs_are_compiled_once_per_length(tiny: Subject) -> None:
    """Contexts of 1 to 400 characters make rows of 64 and of 120 positions, the only two lengths of this model."""
    assert rows.lengths_for(120) == (64, 120)
    scorer = tiny.scorer(mesh_of(1, 1, 1))
    draw = random.Random(0)
    for _ in range(2):
        asked = [Asked(draw.choice("天地玄黄") * draw.randint(1, 400), ("宇" * n, "宙" * 2)) for n in range(1, 13)]
        answers(scorer, asked)
        assert scorer._program._cache_size() == 2  # pyright: ignore[reportAttributeAccessIssue]


def test_broken_weights_have_no_score(tiny: Subject) -> None:
    """A NaN would make every option equally good, and the first the answer."""
    broken = replace(tiny, arrays=tiny.arrays | {"norm": np.full_like(tiny.arrays["norm"], np.nan)})
    with pytest.raises(InputError, match="request 0: log-probabilities .nan, nan., expected finite numbers"):
        list(broken.scorer(mesh_of(1, 1, 1)).score([Asked("天", ("宇", "宙"))]))


def test_results_come_as_batches_finish(one_device: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = one_device._start
    monkeypatch.setattr(one_device, "_start", lambda batch: started.append(batch) or start(batch))
    scores = one_device.score([Asked("宇" * 100, ("天", "地")) for _ in range(80)])
    per_batch = PORTIONS["cpu"].batch_tokens // 120
    next(scores)
    assert len(started) == 2  # one whose scores are there, one that is being computed
    assert len(list(scores)) == 79
    assert len(started) == -(-80 // per_batch)


def test_a_row_is_laid_out_as_drawn() -> None:
    """The example of rows.py, and what stands beside it in the arrays of a batch of two groups."""
    options = [rows.Option([1, 5, 6], [7, 8, 9]), rows.Option([1, 5, 6], [4])]
    (row,) = rows.rows_of(3, options, 120)
    assert row.question == 3
    assert row.tokens.tolist() == [1, 5, 6, 7, 8]
    assert row.positions.tolist() == [0, 1, 2, 3, 4]
    assert row.branches.tolist() == [0, 0, 0, 1, 1]
    assert row.sites.tolist() == [2, 3, 4]
    assert row.targets[:, :2].tolist() == [[7, 4], [8, 0], [9, 0]]
    assert row.options[:, :3].tolist() == [[0, 1, -1], [0, -1, -1], [0, -1, -1]]
    batch = rows.batch_of([row, row, row], length=6, batch_size=4, num_groups=2)
    # Rows are dealt in turn: the first and the third to group 0, the second to group 1.
    assert batch.arrays["segments"].sum(axis=1).tolist() == [5, 5, 5, 0]
    assert batch.arrays["sites"][:, :7].tolist() == [[2, 3, 4, 8, 9, 10, 0], [2, 3, 4, 0, 0, 0, 0]]
    assert batch.num_sites == 6
    assert batch.owners[0][:, 0].tolist() == [[0, 0], [0, 0], [0, 0], [2, 0], [2, 0], [2, 0]]
    assert batch.owners[1][0, 1].tolist() == [1, 1]


def test_what_cannot_be_scored_is_refused(tiny: Subject, one_device: Scorer) -> None:
    with pytest.raises(InputError, match="'' behind '玄' has no token of its own"):
        answers(one_device, [Asked("玄", ("宇", ""))])
    with pytest.raises(InputError, match="'地' behind '天' has no token of its own"):  # 天地 is one piece
        answers(one_device, [Asked("天", ("地",))])
    with pytest.raises(InputError, match="121 tokens does not fit the model's context of 120"):
        answers(one_device, [Asked("玄", ("宇" * 121,))])
    assert answers(one_device, [Asked("玄", ("宇" * 120,))])[0].num_truncated == 1


def test_bfloat16_stays_near_float32(tiny: Subject, one_device: Scorer) -> None:
    """Eight bits of a mantissa: a token's log-probability moves by some hundredths, a wrong one by whole units."""
    narrow = answers(tiny.scorer(mesh_of(1, 1, 1), replace(COMPUTE, dtype="bfloat16")), ASKED[:4])
    for scores, exact in zip(narrow, answers(one_device, ASKED[:4]), strict=True):
        np.testing.assert_allclose(scores.loglikelihoods, exact.loglikelihoods, rtol=0, atol=0.3)
        assert scores.loglikelihoods != exact.loglikelihoods


def test_a_trained_model_on_real_questions(shared_data: Path) -> None:
    """stories260K has 512 pieces, Chinese characters are bytes: longer passages exceed a context of 256."""
    weights = open_any(shared_data / "weights" / "stories260K-meta")
    assert weights.tokenizer_model is not None
    tensors = {name: lazy.read().astype(np.float32) for name, lazy in weights.tensors.items()}
    trained = subject(replace(weights.model, context_length=256), tensors, weights.tokenizer_model)
    read = json.loads((shared_data / "eval" / "c3" / "c3-m-test.json").read_text("utf-8"))
    chosen = [(turns, question) for turns, questions, _ in read[:3] for question in questions[:1]]
    asked = [
        Asked(f"{' '.join(turns)}\n问题：{question['question']}\n答案：", tuple(question["choice"]))
        for turns, question in chosen
    ]
    asked.append(Asked("Once upon a time, there was a", (" little girl", " big dog named Max.", " tsar", "\n")))
    found = answers(trained.scorer(mesh_of(1, 1, 1)), asked)
    for one, scores in zip(asked, found, strict=True):
        expected = [trained.oracle(one.context, continuation)[0] for continuation in one.continuations]
        np.testing.assert_allclose(scores.loglikelihoods, expected, rtol=0, atol=1e-3)
    assert 0 < sum(scores.num_truncated for scores in found) < sum(len(one.continuations) for one in asked)
