"""Write with a model: `python -m panda_jax.generate --checkpoint DIR (--prompt TEXT | --prompts FILE | --chat)`.

DIR is a run, a checkpoint, a folder of weights, or a Hugging Face or Meta folder. Texts of --prompts are written as one
JSON object a line, in the order of the prompts; --prompt and --chat show the text while it is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax

from panda_jax import sharding
from panda_jax.atomic import write_atomically
from panda_jax.command_line import Parser, run_door
from panda_jax.config import Compute, Mesh
from panda_jax.errors import InputError
from panda_jax.generation.chat import Chat, template_of_run
from panda_jax.generation.decode import Generator, decoding
from panda_jax.generation.prompt_file import Prompt, check_lengths, of_text, read_prompts, written_line
from panda_jax.generation.sampling import Sampling
from panda_jax.text.streaming import Detokenizer
from panda_jax.text.templates import find_template
from panda_jax.text.tokenizer import Tokenizer
from panda_jax.training.load import load


def main(arguments: list[str]) -> None:
    """Generate what `arguments` ask for; raises InputError for whatever is wrong with them."""
    options = parser().parse_args(arguments)
    template = find_template(options.template) if options.template else None
    mesh = Mesh(fsdp=options.fsdp, tensor=options.tensor, zero=3)
    sampling = Sampling(
        max_new_tokens=1 if options.max_new_tokens is None else options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_ids=(),
    )
    sharding.start_processes(mesh)
    compute = Compute(dtype=options.dtype)
    sharding.configure_jax(compute)
    sharding.by_first("place of the texts", lambda: prepare_place(options.output))
    loaded = load(options.checkpoint, compute, mesh, options.cache_dir, sharding.say)
    tokenizer, context = loaded.tokenizer, loaded.model.context_length
    new = min(256, context // 2) if options.max_new_tokens is None else options.max_new_tokens
    sampling = replace(sampling, max_new_tokens=new, stop_ids=(tokenizer.eos_id,))
    generator = Generator(loaded.model, loaded.parameters, decoding(compute, loaded.mesh), loaded.mesh)
    generator.batch_size = options.batch_size if options.prompts else 1

    if options.chat:
        if jax.process_count() > 1:
            raise InputError(f"--chat: {jax.process_count()} processes have no common keyboard; start one")
        own = template or template_of_run(loaded.run)
        converse(Chat(generator, tokenizer, own, sampling, print), own.name)
        return
    if options.prompt is not None:
        prompts = [of_text("--prompt", options.prompt, tokenizer, template)]
    else:
        prompts = read_prompts(options.prompts, tokenizer, template, lambda: template_of_run(loaded.run))
    check_lengths(prompts, sampling.max_new_tokens, context)
    if options.prompt is not None and options.output is None:
        show(prompts[0], generator, sampling, tokenizer)
        return
    written = generator.generate([prompt.ids for prompt in prompts], sampling)
    lines = [written_line(*pair, tokenizer) for pair in zip(prompts, written, strict=True)]
    sharding.by_first("texts written", lambda: publish(lines, options.output))


def parser() -> Parser:
    """Return the door's arguments."""
    result = Parser(prog="python -m panda_jax.generate", description=__doc__, allow_abbrev=False)
    result.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    asked = result.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="a text to continue; with --template, an instruction")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help='.jsonl with {"prompt"} or {"instruction", "input"}, or text lines'
    )
    asked.add_argument("--chat", action="store_true", help="Ctrl-C ends an answer, Ctrl-D leaves")
    result.add_argument("--template", metavar="NAME", help="wording of instructions (default: the run's own)")
    number = {"default": 0, "metavar": "N", "type": int}
    result.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 256, or half the context if less")
    result.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most probable")
    result.add_argument("--top-k", **number, help="draw among the K most probable tokens (default: 0, all)")
    result.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among this much probability")
    result.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="default: 1, none")
    result.add_argument("--seed", **number, help="seeds the draws (default: 0)")
    result.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    result.add_argument("--output", type=Path, metavar="FILE", help="write the texts there instead of on screen")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    result.add_argument("--fsdp", type=int, default=1, metavar="N", help="devices that share the parameters")
    result.add_argument("--tensor", type=int, default=1, metavar="N", help="devices that split each matrix")
    result.add_argument("--cache-dir", type=Path, default=Path("cache"), metavar="DIR", help="converted weights")
    return result


def converse(chat: Chat, wording: str) -> None:
    """Ask and answer on the terminal until the input ends."""
    print(f"Wording: {wording}. Ctrl-C ends an answer, Ctrl-D leaves.")
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
            continue
        if not question.strip():
            continue
        try:
            for piece in chat.ask(question):
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" …")
        except InputError as error:
            print(error)


def show(prompt: Prompt, generator: Generator, sampling: Sampling, tokenizer: Tokenizer) -> None:
    """Print a text while it is written."""
    text = Detokenizer(tokenizer, after=() if prompt.is_turn else prompt.ids)
    for new, _ in generator.stream(prompt.ids, sampling):
        if jax.process_index() == 0:
            print(text.feed(new), end="", flush=True)
    sharding.say(text.flush())


def prepare_place(output: Path | None) -> None:
    """Make the folder of --output, before hours of writing; raises InputError where a folder has its name."""
    if output is not None:
        if output.is_dir():
            raise InputError(f"--output {output}: is a folder; give the name of a file")
        output.parent.mkdir(parents=True, exist_ok=True)


def publish(lines: list[str], output: Path | None) -> None:
    """Write the lines to the file, or on screen where there is none."""
    if output is None:
        print("".join(lines), end="")
    else:
        write_atomically(output, [line.encode() for line in lines])


if __name__ == "__main__":
    run_door(main)
