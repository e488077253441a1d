"""Every setting of panda_jax, typed, once.

A run is described by one YAML file that mirrors these classes; `settings.py` reads it, applies `a.b=c` overrides and
reports mistakes. The string under a field is its documentation: `--help` prints it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class InitFrom:
    """Where the first weights come from: one of `checkpoint`, `hf` and `meta`."""

    checkpoint: str | None = None
    """A run folder, one of its checkpoints/<step> folders, or a weights folder; only the parameters are read."""
    hf: str | None = None
    """A Hugging Face folder; converted once into <data.cache_dir>/weights and found there from then on."""
    meta: str | None = None
    """A folder with Meta's consolidated.*.pth files and params.json; converted once, like `hf`."""
    new_rows: Literal["refuse", "normal", "mean", "zeros"] = "refuse"
    """Rows that the weights lack: N(0, model.init_std), as Panda's [PAD] was drawn, the mean of the old rows, or 0."""

    @model_validator(mode="after")
    def _one_place(self) -> InitFrom:
        given = [name for name in ("checkpoint", "hf", "meta") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"found {found}; give one of `checkpoint`, `hf` and `meta` (null takes one back)")
        return self


@dataclass(frozen=True, config=STRICT)
class Model:
    """The LLaMA to train. `size` fills every field that is not given."""

    vocab_size: Positive
    """Rows of the embedding and of the output layer: the tokenizer's pieces and tokenizer.extra_ids."""
    dim: Positive
    """Width of the residual stream."""
    num_layers: Positive
    """Transformer blocks."""
    num_heads: Positive
    """Query heads; head_dim = dim / num_heads."""
    num_kv_heads: Positive
    """Key/value heads (grouped-query attention when fewer than num_heads)."""
    mlp_dim: Positive
    """Hidden width of the SwiGLU block."""
    norm_eps: Annotated[float, Field(gt=0)]
    """Epsilon inside RMSNorm: 1e-6 in LLaMA-1 up to 33B, 1e-5 in 65B and Llama-2."""
    context_length: Positive
    """Longest sequence the model is meant for; data.seq_len may not exceed it."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = False
    """Use the embedding table as the output layer as well."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialiser of every matrix."""
    size: str | None = None
    """Name of a preset: llama-7b, -13b, -33b, -65b, llama2-7b, -13b, -70b, tiny-1m, tiny-15m, tiny-110m."""
    init_from: InitFrom | None = None
    """Start from these weights instead of random ones."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_parameters(self) -> int:
        """Number of trained scalars, by arithmetic over the shapes."""
        kv_dim = self.num_kv_heads * self.head_dim
        layer = 2 * self.dim * self.dim + 2 * self.dim * kv_dim + 3 * self.dim * self.mlp_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.dim

    @model_validator(mode="after")
    def _divisible(self) -> Model:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be num_heads {self.num_heads} times an even head size; change one")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self


@dataclass(frozen=True, config=STRICT)
class Tokenizer:
    """The SentencePiece vocabulary."""

    path: str
    """A SentencePiece .model file."""
    extra_ids: Count = 0
    """Rows of the model beyond the tokenizer's pieces that no text becomes, such as Panda's [PAD] = 32000."""
    train_vocab_size: Positive | None = None
    """When `path` does not exist: train a BPE vocabulary of this size on data.sources and write it there."""
    character_coverage: Fraction = 0.9995
    """Share of characters the trained vocabulary must cover; the rest become bytes."""
    train_max_bytes: Positive = 200_000_000
    """Text read for vocabulary training, at most."""


@dataclass(frozen=True, config=STRICT)
class Source:
    """One corpus, or one part of one."""

    corpus: str
    """Name of the reader, a key of CORPORA in panda_jax/data/corpora.py."""
    path: str
    """A file, a glob or a directory; .gz, .zip and .tar.gz are read in place."""
    name: str = ""
    """Name in reports; the corpus when empty."""
    template: str = ""
    """Name of the prompt template, a key of TEMPLATES in panda_jax/text/templates.py; the corpus's own when empty."""
    instruction: str | None = None
    """Put this before every question instead of the corpus's own instruction."""
    direction: Literal["en-zh", "zh-en", "alternate", "both"] = "alternate"
    """translation2019zh only: which side is the source text; `alternate` flips by record number."""
    epochs: Annotated[float, Field(ge=0)] | None = None
    """How often each record is used in one pass over the data (default 1); 1.5 repeats a seeded half of them."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the tokens instead of `epochs`: all sources or none; needs data.total_tokens."""
    held_out: Count | Literal["all"] = 0
    """Records set aside for the held-out loss, chosen by seed and never trained on."""
    overlong: Literal["truncate", "split", "drop"] = "truncate"
    """A record longer than the window: cut it, make several windows of it, or drop it."""
    compat: Literal["none", "panda"] = "none"
    """`panda` reproduces the original's tokenisation and masking, mistakes included (PROTOCOLS.md §4.3)."""
    max_records: Positive | None = None
    """Read only the first records."""

    @property
    def label(self) -> str:
        return self.name or self.corpus

    @model_validator(mode="after")
    def _one_share(self) -> Source:
        if self.epochs is not None and self.weight is not None:
            raise ValueError("give `epochs` or `weight`, not both")
        return self


@dataclass(frozen=True, config=STRICT)
class Data:
    """What is trained on, and in which order."""

    sources: tuple[Source, ...]
    """The mixture."""
    seq_len: Positive = 2048
    """Tokens per row."""
    packing: bool = True
    """Fill rows with several records, kept apart by segment ids; otherwise one record per row."""
    shuffle: bool = True
    """Draw a new seeded order for every pass; otherwise keep the corpora in the order given."""
    total_tokens: Positive | None = None
    """Tokens in one pass when sources carry weights."""
    max_dropped_fraction: Fraction = 0.01
    """Stop when more records than this are dropped from a source."""
    cache_dir: str = "cache"
    """Where tokenised shards are kept."""
    tokenize_workers: Count = 0
    """Processes that tokenise; 0 means one per core."""
    loader_workers: Count = 0
    """Processes that read ahead during training; 0 reads in a thread, the fastest on few cores."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if not self.sources:
            raise ValueError("`sources` is empty; name at least one corpus")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("`weight` is given for some sources only; give it for all of them or none")
        if any(weighted) != (self.total_tokens is not None):
            raise ValueError("sources with `weight` need `total_tokens`, and only they do")
        labels = [source.label for source in self.sources]
        if repeated := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"two sources are called {sorted(repeated)[0]!r}; give them different `name`s")
        return self


@dataclass(frozen=True, config=STRICT)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101); defaults from Panda's DeepSpeed config."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.99
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms are never decayed."""


@dataclass(frozen=True, config=STRICT)
class SGD:
    """Stochastic gradient descent, what the Panda paper says it used."""

    kind: Literal["sgd"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate."""
    momentum: Fraction = 0.0
    """Decay of the velocity."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms are never decayed."""


@dataclass(frozen=True, config=STRICT)
class Lion:
    """Sign of an interpolated momentum (arXiv:2302.06675)."""

    kind: Literal["lion"]
    learning_rate: Annotated[float, Field(gt=0)] = 3e-6
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Interpolation used for the step."""
    beta2: Fraction = 0.99
    """Decay of the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms are never decayed."""


@dataclass(frozen=True, config=STRICT)
class Adafactor:
    """Factored second moments (arXiv:1804.04235), for when optimizer state does not fit."""

    kind: Literal["adafactor"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    decay_rate: Fraction = 0.8
    """Exponent of the second-moment decay schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms are never decayed."""


Optimizer = Annotated[AdamW | SGD | Lion | Adafactor, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Learning rate over the run: a linear warm-up, then the named shape."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up; linear and cosine fall to final_fraction of the peak."""
    warmup_steps: Count | None = None
    """Steps of warm-up; wins over warmup_fraction."""
    warmup_fraction: Fraction = 0.01
    """Warm-up as a share of the schedule's steps."""
    total_steps: Positive | None = None
    """Steps until the schedule ends; the run's own number of steps when null."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """The loop."""

    global_batch_size: Positive = 128
    """Rows per optimizer step, over all devices."""
    micro_batch_size: Positive | None = None
    """Rows per data-parallel device and forward pass; null means no gradient accumulation."""
    epochs: Positive = 1
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many steps even if data remain."""
    trainable: Literal["all", "embeddings"] | tuple[str, ...] = "all"
    """What is trained: everything, embedding and output rows only, or parameters that match a pattern (`layers.w*`)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest global gradient norm; null does not clip."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A non-finite gradient never reaches the parameters; then stop, or skip the step and go on."""
    eval_every_steps: Positive | None = None
    """Measure the held-out loss this often, besides at the end."""
    log_every_steps: Positive = 10
    """Write a line of metrics this often."""


@dataclass(frozen=True, config=STRICT)
class Compute:
    """How the step is executed; none of it changes what is computed beyond rounding."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products; parameters, norms, softmax and loss stay in float32."""
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    """Attention backend; auto takes cuDNN on NVIDIA GPUs where it can honour segments, XLA elsewhere."""
    attention_block: Positive = 128
    """Query rows per block of the XLA backend."""
    remat: Literal["none", "full", "dots"] = "full"
    """What the backward pass recomputes: nothing, whole layers, or all but matrix products."""
    layer_loop: Literal["scan", "unroll"] = "scan"
    """Scan compiles once and needs least memory; unroll is faster for small models."""
    loss_chunk_tokens: Positive = 1024
    """Tokens whose logits exist at the same time on a device."""
    compilation_cache_dir: str | None = "~/.cache/panda_jax/xla"
    """Compiled programs are kept here across starts; null switches it off."""


@dataclass(frozen=True, config=STRICT)
class Mesh:
    """The devices, and how the model is spread over them."""

    data: int = -1
    """Replicas with their own rows; -1 takes the devices that are left."""
    fsdp: int = 1
    """Devices that share rows and optimizer state (and parameters, with zero: 3)."""
    tensor: Positive = 1
    """Devices that split heads, MLP and vocabulary."""
    zero: Literal[1, 3] = 1
    """1: parameters replicated over fsdp, optimizer state sharded; 3: parameters sharded as well."""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """Refuse to start on anything else."""
    init_timeout_s: Positive = 300
    """How long multi-process start-up waits for every process."""


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """What is kept of a run."""

    every_steps: Positive | None = None
    """Save this often, besides at the end and on SIGTERM."""
    steps: tuple[Positive, ...] = ()
    """Save at these steps and keep them for good."""
    keep: Positive = 3
    """Periodic checkpoints kept; older ones are deleted."""


@dataclass(frozen=True, config=STRICT)
class Log:
    """Where the numbers go besides metrics.jsonl."""

    runs_dir: str = "runs"
    """The run folder is <runs_dir>/<name>."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project; needs the [wandb] extra."""


@dataclass(frozen=True, config=STRICT)
class Eval:
    """Multiple-choice tasks that are scored while the run trains, on a sample of their questions."""

    tasks: tuple[str, ...] = ()
    """Keys of TASKS in panda_jax/evaluation/tasks.py; none is scored when empty."""
    data: str = ""
    """Folder with the tasks' official files."""
    split: str = ""
    """Whose questions are sampled; each task's own when empty."""
    protocols: tuple[str, ...] = ("likelihood",)
    """Keys of PROTOCOLS in panda_jax/evaluation/prompts.py."""
    num_questions: Positive = 200
    """Questions of each task, chosen by seed, the same ones every time."""
    shots: Count | None = None
    """Worked examples before each question; each task's own number when null."""
    every_steps: Positive | None = None
    """Score this often, besides at the end."""


@dataclass(frozen=True, config=STRICT)
class Config:
    """One run."""

    name: str
    """Name of the run and of its folder."""
    model: Model
    tokenizer: Tokenizer
    data: Data
    objective: str = "causal"
    """What is minimised, a key of OBJECTIVES in panda_jax/objectives."""
    seed: int = 42
    """Seeds the initial weights, the data order and every other draw."""
    optimizer: Optimizer = Field(default_factory=AdamW)
    schedule: Schedule = Field(default_factory=Schedule)
    train: Train = Field(default_factory=Train)
    compute: Compute = Field(default_factory=Compute)
    mesh: Mesh = Field(default_factory=Mesh)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    eval: Eval = Field(default_factory=Eval)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _fits_context(self) -> Config:
        if self.data.seq_len > self.model.context_length:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} exceeds model.context_length {self.model.context_length}; lower it"
            )
        return self
