"""Settings from a command line: a dataclass is the options, each field a line with its default, help and range."""
import argparse
import dataclasses
import inspect
import math
import sys
import typing

from lab.errors import BadInput, RunFailed


def setting(default, help, *, above=None, at_least=None, below=None, choices=None, positional=False, option=True,
            trains=True):
    """One field of a settings dataclass.

    above, at_least, below: its range, for numbers, which must be finite. choices: its values. positional: the first
    word of the command line, without the dashes. option=False: set in code alone. trains=False: a run that goes on
    may have another value.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, above=above, at_least=at_least, below=below, choices=choices, positional=positional, option=option,
        trains=trains))


def option(name):
    """The option that sets a field: --like-this for like_this."""
    return "--" + name.replace("_", "-")


def check_ranges(s):
    """BadInput where a number of the settings `s` is out of the range that its field gives."""
    for f in dataclasses.fields(s):
        value, m = getattr(s, f.name), f.metadata
        for v in value if isinstance(value, tuple) else (value,):
            if m["choices"] and v not in m["choices"]:
                raise BadInput(f"{option(f.name)} {v} is not known; known are {', '.join(m['choices'])}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        parts = [(m["above"], "above", lambda v, b: v > b), (m["at_least"], "at least", lambda v, b: v >= b),
                 (m["below"], "below", lambda v, b: v < b)]
        parts = [(bound, word, holds) for bound, word, holds in parts if bound is not None]
        if not math.isfinite(value) or not all(holds(value, bound) for bound, _, holds in parts):
            must = " and ".join(["finite", *(f"{word} {bound:g}" for bound, word, _ in parts)])
            raise BadInput(f"{option(f.name)} must be {must}, not {value}")


def comparable(s):
    """The settings that must not change between a run and its continuation: those that training depends on."""
    return {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.metadata.get("trains", True)}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise BadInput(f"{message} (--help lists the options)")


def parse(cls, argv, description=""):
    """The settings dataclass `cls` from a command line. BadInput for an unknown option or a value out of range."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    types, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):  # inherited ones last
        kind, help = types[f.name], f.metadata["help"]
        if not f.metadata["option"]:
            continue
        if f.metadata["positional"]:  # also as an option, for a command that hands its words over
            parser.add_argument(f.name, nargs="?", default=argparse.SUPPRESS, help=help)
            parser.add_argument(option(f.name), default=f.default, help=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(option(f.name), action="store_true", help=help)
        elif kind is tuple:
            parser.add_argument(option(f.name), nargs="+", default=f.default, help=help)
        else:
            parser.add_argument(option(f.name), type=kind, default=f.default, help=help)
    values = vars(parser.parse_intermixed_args(argv))
    s = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for f in dataclasses.fields(cls):
        if f.metadata["positional"] and not getattr(s, f.name):
            raise BadInput(f"{f.metadata['help'].split(':')[0]} is required (--help says more)")
    return s


def command(main):
    """Run main(argv) as a program: bad input is one line and exit code 2, a failed run one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no name of a class may end a run because a terminal lacks its letters
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except BadInput as e:
        sys.exit(_one_line(e, 2))
    except (RunFailed, OSError) as e:
        sys.exit(_one_line(e, 1))
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted", 130))
    except RuntimeError as e:
        # as torch says it of cuda and mps, of the CPU, and of the CPU on Windows
        lacking = ("out of memory", "can't allocate memory", "not enough memory")
        if any(words in str(e) for words in lacking):
            sys.exit(_one_line(f"{str(e).splitlines()[0]}: try a smaller --batch, where the command has one", 1))
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(_one_line(f"torch.compile failed: {str(e).strip().splitlines()[0]}: go on without --compile", 1))
        raise


def _one_line(e, code):
    print("error:", " ".join(str(e).split()), file=sys.stderr)
    return code
