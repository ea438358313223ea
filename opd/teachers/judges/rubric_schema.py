"""JSON schemas of the forms that a judge fills in, for servers and engines with constrained decoding.

`judge.read` validates every answer again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Listed:
    """Constraints on a list: its length, and the values of one field of its items.

    The list has `least` to `most` items.  The first items have the given `values` of `field`, in order.  In each later
    item the field has one of the values `others`, if any are given.
    """

    least: int
    most: int
    field: str = ""
    values: tuple[int, ...] = ()
    others: tuple[int, ...] = ()


Lists = Mapping[str, Listed]  # by the name of the list's field in the form


def schema(form: type[BaseModel], lists: Lists) -> str:
    """Return the JSON schema of a form, without additional properties and with constraints on its lists."""
    whole = form.model_json_schema()
    parts = whole.get("$defs", {})
    every = (*parts.values(), whole)
    for part in every:
        part["additionalProperties"] = False
    for part in every:
        for name, field in part["properties"].items():
            if name in lists:
                told = lists[name]
                field |= {"minItems": told.least, "maxItems": told.most}
                if told.field:
                    item = parts[field["items"]["$ref"].rpartition("/")[2]]
                    field["prefixItems"] = [_having(item, told.field, {"const": value}) for value in told.values]
                    if told.others:
                        field["items"] = _having(item, told.field, {"enum": list(told.others)})
    return json.dumps(whole)


def _having(item: dict, name: str, value: object) -> dict:
    return {**item, "properties": {**item["properties"], name: value}}
