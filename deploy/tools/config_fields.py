"""What the services' configurations hold, read from their Rust sources: the structs that serde fills from TOML.

A reader of this repository's own style, not of Rust: a struct is `pub struct Name {`, a line `pub field: Type,` per
field, `}`. What it cannot read is an error, never skipped.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ["router", "encoder", "llm", "decoder"]
# The part that every service shares.
SHARED = "serve"

STRUCT = re.compile(r"((?:#\[[^\n]*\]\n)+)pub struct (\w+) \{\n(.*?)\n\}", re.DOTALL)
FIELD = re.compile(r"pub (\w+): ([^\n]+),")

# Types that are one TOML value, as Python reads it.
SCALARS = {"bool": bool, "String": str, "PathBuf": str, "SocketAddr": str, "RedisUrl": str, "LogFormat": str}
SCALARS |= {"AuthMode": str, "TokenHash": str, "TlsMode": str, "Priority": str}
INTEGER = re.compile(r"[iu](8|16|32|64|size)")


def structs(crate):
    """Name -> {field: type, as written} of a crate's structs that refuse unknown keys."""
    found = {}
    for source in sorted((ROOT / "services" / crate / "src").rglob("*.rs")):
        for attributes, name, body in STRUCT.findall(source.read_text()):
            if "deny_unknown_fields" in attributes:
                found[name] = dict(FIELD.findall(body))
    return found


def shape(type_, known):
    """A type as nested dicts, lists and the Python types of scalars."""
    if inner := re.fullmatch(r"Option<(.+)>", type_):
        return shape(inner[1], known)
    if inner := re.fullmatch(r"Vec<(.+)>", type_):
        return [shape(inner[1], known)]
    if INTEGER.fullmatch(type_):
        return int
    if type_ in ("f32", "f64"):
        return float
    if type_ in SCALARS:
        return SCALARS[type_]
    if type_ in known:
        return {field: shape(inner, known) for field, inner in known[type_].items()}
    sys.exit(f"deploy/tools/config_fields.py: the configuration type {type_} is new here: say what TOML it is")


def configs():
    """Service -> the shape of its `Config`."""
    shared = structs(SHARED)
    return {service: shape("Config", shared | structs(service)) for service in SERVICES}


def mistakes(value, shape_, path=""):
    """Where a TOML value does not fit a shape; a line each."""
    if isinstance(shape_, dict):
        if not isinstance(value, dict):
            return [f"{path} must be a table"]
        unknown = [f"{path}{key} is no key of the service" for key in value if key not in shape_]
        inner = (mistakes(value[key], shape_[key], f"{path}{key}.") for key in value if key in shape_)
        return unknown + [line for lines in inner for line in lines]
    if isinstance(shape_, list):
        if not isinstance(value, list):
            return [f"{path} must be a list"]
        return [line for item in value for line in mistakes(item, shape_[0], path)]
    # A whole number may stand for a float; a bool is no number, though Python takes it for one.
    fits = isinstance(value, (int, float) if shape_ is float else shape_)
    if not fits or (isinstance(value, bool) and shape_ is not bool):
        return [f"{path.rstrip('.')} must be {shape_.__name__}, got {value!r}"]
    return []


def leaves(shape_, path=()):
    """Every key of a shape, as tuples from the root."""
    if not isinstance(shape_, dict):
        return {path}
    return {leaf for key, inner in shape_.items() for leaf in leaves(inner, (*path, key))}
