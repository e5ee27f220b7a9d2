"""Options of a command line from a dataclass: each field is one option, with its default, help and range."""
import dataclasses
import inspect
import math
import os
import typing

from edm_unet import BadInput, Parser


def setting(default, help, *, above=None, at_least=None, below=None, choices=None, positional=False, option=True,
            trains=True):
    """One field of a settings dataclass.

    above, at_least, below: range of a number, which must be finite. choices: allowed values. positional: the first word
    of the command line. option=False: set in code alone. trains=False: may change when a run is resumed.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, above=above, at_least=at_least, below=below, choices=choices, positional=positional, option=option,
        trains=trains))


def option_name(name):
    """--like-this for the field like_this."""
    return "--" + name.replace("_", "-")


def check_ranges(s):
    """Raise BadInput where a setting of the dataclass `s` is out of the range that its field gives."""
    for f in dataclasses.fields(s):
        value, m = getattr(s, f.name), f.metadata
        for v in value if isinstance(value, tuple) else (value,):
            if m.get("choices") and v not in m["choices"]:
                raise BadInput(f"{option_name(f.name)} {v} is not known; known are {', '.join(m['choices'])}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        bounds = []
        if m.get("above") is not None:
            bounds.append((f"above {m['above']:g}", value > m["above"]))
        if m.get("at_least") is not None:
            bounds.append((f"at least {m['at_least']:g}", value >= m["at_least"]))
        if m.get("below") is not None:
            bounds.append((f"below {m['below']:g}", value < m["below"]))
        if not math.isfinite(value) or not all(holds for _, holds in bounds):
            must = " and ".join(["finite", *(words for words, _ in bounds)])
            raise BadInput(f"{option_name(f.name)} must be {must}, not {value}")


def comparable(s):
    """The settings that must not change when a run is resumed."""
    return {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.metadata.get("trains", True)}


def defaults(s):
    """{name: default} of the settings that have one."""
    return {f.name: f.default for f in dataclasses.fields(s) if f.default is not dataclasses.MISSING}


def given_options(cls, argv, description=""):
    """{field: value} of the options of the dataclass `cls` that a command line gives. BadInput for unknown options."""
    parser = Parser(description)
    types, own = typing.get_type_hints(cls), inspect.get_annotations(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):  # inherited fields last
        m = f.metadata
        if not m.get("option", True):
            continue
        text = m.get("help", "as in sfd_minimal.py").replace("%", "%%")
        help = text if f.default in ("", None) else f"{text} (default: {f.default})"
        if m.get("positional"):
            parser.add_argument(f.name, nargs="+" if types[f.name] is tuple else None, help=text)
        elif types[f.name] is bool:
            parser.add_argument(option_name(f.name), action="store_true", default=None, help=text)
        elif types[f.name] is tuple:
            parser.add_argument(option_name(f.name), nargs="+", help=help)
        else:
            parser.add_argument(option_name(f.name), type=types[f.name], help=help)
    found = vars(parser.parse_intermixed_args(argv))
    if found.get("out"):
        found["out"] = os.path.expanduser(found["out"])  # shells leave the ~ in --out=~/x
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}


def parse(cls, argv, description=""):
    """The settings dataclass `cls` from a command line. BadInput for unknown options and values out of range."""
    s = cls(**given_options(cls, argv, description))
    check_ranges(s)
    return s
