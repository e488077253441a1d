"""A checkpoint of ours as a model of lm-evaluation-harness; panda_jax/lm_eval.py makes it known there.

Its methods take and give what the harness's own Hugging Face backend takes and gives for the same model, exported:
BOS before every text, the same truncation, the same stop strings. Needs the [lm-eval] extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from panda_jax import sharding
from panda_jax.config import Compute, Mesh
from panda_jax.errors import InputError
from panda_jax.evaluation.likelihood import Scorer
from panda_jax.evaluation.prompts import ChoiceRequest
from panda_jax.evaluation.rows import Option
from panda_jax.generation.decode import Generator, decoding
from panda_jax.generation.sampling import Sampling
from panda_jax.training.load import load

# What the Hugging Face backend writes when a task names no limit, and draws among when it names none.
DEFAULT_NEW_TOKENS = 256
DEFAULT_TOP_K = 50
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


def model_class() -> type:
    """Return the class for the harness's registry; raises InputError where the harness is not installed."""
    try:
        base = import_module("lm_eval.api.model").LM
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness cannot be imported ({error}); install the [lm-eval] extra of panda_jax"
        ) from error
    return type("PandaJax", (Answers, base), {})


class Answers:
    """What the harness asks of a model, answered by one checkpoint on the devices of this process.

    A request is one of the harness's instances; its `args` are what each method says.
    """

    cache_hook: Any
    """The harness's, which keeps answers across runs."""

    def __init__(
        self,
        checkpoint: str,
        dtype: str = "bfloat16",
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        zero: int = 1,
        seed: int = 0,
        cache: str = "cache",
        **others: Any,
    ) -> None:
        """Load `checkpoint`: a run, a checkpoint, a weights folder or a Hugging Face folder.

        data, fsdp, tensor and zero lay the model over the devices as in a training config; `seed` seeds draws; a
        foreign folder is converted once, into `cache`. Raises InputError for anything else that is not the
        harness's own (batch_size, max_batch_size and device, which have no meaning here).
        """
        super().__init__()
        if unknown := sorted(others.keys() - {"batch_size", "max_batch_size", "device"}):
            raise InputError(
                f"--model_args: {unknown[0]} is unknown; panda_jax takes checkpoint, dtype, data, fsdp, tensor, zero, "
                f"seed and cache"
            )
        if dtype not in ("bfloat16", "float32"):
            raise InputError(f"--model_args: dtype={dtype}, expected bfloat16 or float32")
        if zero not in (1, 3):
            raise InputError(f"--model_args: zero={zero}, expected 1 or 3")
        compute = Compute(dtype=dtype)
        sharding.configure_jax(compute)
        mesh = Mesh(data=data, fsdp=fsdp, tensor=tensor, zero=zero)
        loaded = load(Path(checkpoint), compute, mesh, Path(cache), Console(stderr=True).print)
        self._loaded, self._seed = loaded, seed
        self._scorer = Scorer(loaded.model, loaded.parameters, compute, loaded.mesh, loaded.tokenizer)
        self._generator = Generator(loaded.model, loaded.parameters, decoding(compute, loaded.mesh), loaded.mesh)

    @property
    def tokenizer_name(self) -> str:
        """What names cached requests."""
        return self._loaded.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness keeps beside the results."""
        return {"model_num_parameters": self._loaded.model.num_parameters, "model_source": str(self._loaded.source)}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation and whether it is the greedy one; args: both texts."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.args[0], []).append(place)
        asked = []
        for context, own in places.items():
            continuations = tuple(requests[place].args[1] for place in own)
            asked.append(ChoiceRequest(context, continuations, tuple(map(len, continuations))))
        groups = list(places.values())
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for number, scores in self._scorer.score(asked):
            for place, value, is_greedy in zip(groups[number], scores.loglikelihoods, scores.is_greedy, strict=True):
                answers[place] = (value, is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[place].args, answers[place])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, windows of the model's context after one another; args: it.

        The text's own BOS is predicted from another one, as the Hugging Face backend does.
        """
        cut = import_module("lm_eval.utils")
        tokenizer, length = self._loaded.tokenizer, self._loaded.model.context_length
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = [tokenizer.bos_id, *tokenizer.encode(request.args[0])]
            for pair in cut.get_rolling_token_windows(tokens, tokenizer.bos_id, length, context_len=1):
                windows.append([Option(*cut.make_disjoint_window(pair))])
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = dict(self._scorer.score_tokens(windows))
        for number, owner in enumerate(owners):
            totals[owner] += scores[number].loglikelihoods[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to the first stop string; args: the context and the task's settings."""
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in by_settings.values():
            contexts = [requests[place].args[0] for place in places]
            for place, text in zip(places, self._generate(contexts, requests[places[0]].args[1]), strict=True):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return answers

    def _generate(self, contexts: Sequence[str], given: dict[str, Any]) -> list[str]:
        """Return the texts that follow `contexts`, all under the same settings of the harness."""
        rules = import_module("lm_eval.models.utils")
        settings: dict[str, Any] = dict(rules.normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        if unknown := sorted(settings.keys() - GENERATION_SETTINGS):
            raise InputError(f"the task generates with {unknown[0]}, which panda_jax does not know; remove it")
        tokenizer, num_new = self._loaded.tokenizer, settings["max_gen_toks"]
        room = self._loaded.model.context_length - num_new
        if room <= 0:
            raise InputError(
                f"max_gen_toks {num_new} leaves no room for a prompt in the model's context of "
                f"{self._loaded.model.context_length}; lower it with --gen_kwargs max_gen_toks=N"
            )
        sampling = Sampling(
            max_new_tokens=num_new,
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k", DEFAULT_TOP_K) if settings["do_sample"] else 0,
            top_p=settings.get("top_p", 1.0),
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            seed=self._seed,
            stop_ids=(tokenizer.eos_id,),
        )
        prompts = [[tokenizer.bos_id, *tokenizer.encode(context)][-room:] for context in contexts]
        texts = (tokenizer.decode(found.ids) for found in self._generator.generate(prompts, sampling))
        return [rules.postprocess_generated_text(text, settings["until"], None) for text in texts]
