"""The JSON schema of a form, for servers and engines that keep to one; `judge.read` is what decides all the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Listed:
    """What a list must hold: so many items, the first of which have given values of a field, the others one of some."""

    least: int
    most: int
    field: str = ""
    values: tuple[int, ...] = ()
    others: tuple[int, ...] = ()


Lists = Mapping[str, Listed]  # by the name of their field


def schema(form: type[BaseModel], lists: Lists) -> str:
    """Closed, with such lists."""
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
