"""The JSON schema of a form, for servers and engines that keep to one; `judge.read` is what decides all the same."""

import json
from collections.abc import Mapping

from pydantic import BaseModel

Lengths = Mapping[str, tuple[int, int]]  # of lists, by the name of their field: least and most


def schema(form: type[BaseModel], lengths: Lengths) -> str:
    """Closed, with lists of such lengths; where the length is known, items with an index have theirs."""
    whole = form.model_json_schema()
    parts = whole.get("$defs", {})
    every = (*parts.values(), whole)
    for part in every:
        part["additionalProperties"] = False
    for part in every:
        for name, field in part["properties"].items():
            if name in lengths:
                least, most = lengths[name]
                field |= {"minItems": least, "maxItems": most}
                item = parts.get(field["items"].get("$ref", "").rpartition("/")[2], {})
                if least == most and "index" in item.get("properties", {}):
                    own = lambda i, item=item: {**item, "properties": {**item["properties"], "index": {"const": i}}}
                    field["prefixItems"] = [own(i) for i in range(1, most + 1)]
    return json.dumps(whole)
