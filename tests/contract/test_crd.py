"""The CRD against the rules for structural schemas, written out here from the Kubernetes documentation."""

import re

from heterorl.spec.base import Block, block_in
from heterorl.spec.crd import RULES, change_rules, crd, crd_yaml
from heterorl.spec.mutability import IMMUTABLE, LIVE
from heterorl.spec.run import HeteroRLRun, RunSpec

# Keywords of apiextensions/v1 JSONSchemaProps that may stand anywhere, and that this CRD has a use for.
ALLOWED = {
    "type",
    "description",
    "default",
    "enum",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
    "properties",
    "additionalProperties",
    "items",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}


def root():
    (version,) = crd()["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def nodes(schema, path=""):
    yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


NODES = list(nodes(root()))


def test_every_node_is_typed_and_uses_only_structural_keywords():
    for path, schema in NODES:
        assert schema.get("type") in ("object", "array", "string", "integer", "number", "boolean"), path
        assert set(schema) <= ALLOWED, path
        assert ("properties" in schema) + ("additionalProperties" in schema) <= 1, path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert isinstance(schema.get(bound, True), bool), path


def test_metadata_is_left_to_the_api_server():
    assert root()["properties"]["metadata"] == {"type": "object"}


def test_every_string_list_and_map_is_bounded():
    for path, schema in NODES:
        if path in ("", ".apiVersion", ".kind", ".metadata"):
            continue
        if schema["type"] == "string":
            assert "maxLength" in schema or "enum" in schema, path
        if schema["type"] == "array":
            assert "maxItems" in schema, path
        if "additionalProperties" in schema:
            assert "maxProperties" in schema, path


def test_list_maps_have_required_keys():
    for path, schema in NODES:
        if schema.get("x-kubernetes-list-type") == "map":
            assert set(schema["x-kubernetes-list-map-keys"]) <= set(schema["items"]["required"]), path
    by_path = dict(NODES)
    assert by_path[".spec.samplers"]["x-kubernetes-list-map-keys"] == ["name"]
    assert by_path[".status.conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_defaults_fit_their_type_and_hold_no_null():
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    for path, schema in NODES:
        if "default" in schema:
            assert isinstance(schema["default"], kinds[schema["type"]]), path
            assert "enum" not in schema or schema["default"] in schema["enum"], path
    assert "null" not in crd_yaml()


def test_a_default_is_complete_where_rules_read_it():
    for path, schema in NODES:
        if "default" in schema and "properties" in schema:
            assert not schema.get("required"), path
            wanted = {key for key, inner in schema["properties"].items() if "default" in inner}
            assert not schema.get("x-kubernetes-validations") or wanted <= set(schema["default"]), path


def test_only_the_affinity_and_the_configuration_of_a_task_are_free_of_a_schema():
    free = {path.split(".")[-1] for path, schema in NODES if schema.get("x-kubernetes-preserve-unknown-fields")}
    assert free == {"affinity", "config"}


def test_columns_name_fields_that_exist():
    by_path = dict(NODES)
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [c["name"] for c in columns if not c.get("priority")] == [
        "State",
        "Step",
        "Steps",
        "Reward",
        "Lag",
        "Samplers",
        "Age",
    ]
    assert [c["name"] for c in columns if c.get("priority")] == ["Model", "Loss", "Restarts"]
    for column in columns:
        if column["type"] != "date":
            assert by_path[column["jsonPath"]]["type"] == column["type"], column


def test_names_and_status_subresource():
    spec = crd()["spec"]
    assert spec["names"]["shortNames"] == ["hrl"]
    assert spec["names"]["categories"] == ["all", "heterorl"]
    assert spec["versions"][0]["subresources"] == {"status": {}}
    assert crd()["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"


def rules():
    return [
        (path, rule["rule"], rule["message"]) for path, s in NODES for rule in s.get("x-kubernetes-validations", [])
    ]


def test_rules_name_only_fields_of_their_block():
    by_path = dict(NODES)
    for path, rule, _ in rules():
        for chain in re.findall(r"\b(?:self|oldSelf)((?:\.\w+)+)(?!\w*\()", re.sub(r"'[^']*'", "''", rule)):
            parts = chain.split(".")[1:]
            schema = by_path[path]
            for part in parts:
                if "properties" not in schema or (path == "" and part == "name"):
                    break
                assert part in schema["properties"], f"{path}: {rule}"
                schema = schema["properties"][part]


def test_messages_are_one_short_line():
    for path, _, message in rules():
        assert 0 < len(message) <= 200, path
        assert "\n" not in message


def test_every_rule_table_is_that_of_a_block_in_the_spec():
    def names(block: type[Block]):
        yield block.__name__
        for info in block.model_fields.values():
            if inner := block_in(info.annotation):
                yield from names(inner)

    assert set(RULES) <= set(names(HeteroRLRun))


def test_every_block_with_rules_in_python_has_rules_in_cel():
    def with_rules(block: type[Block]):
        if "broken_rules" in vars(block):
            yield block.__name__
        for info in block.model_fields.values():
            if inner := block_in(info.annotation):
                yield from with_rules(inner)

    # Data's labels differ by its list-map; whether Python compiles an answerPattern, CEL cannot say: the operator does.
    assert set(with_rules(HeteroRLRun)) - {"DataSpec", "ColumnsSpec"} <= set(RULES)


def test_every_path_that_may_change_live_or_never_is_one_of_the_spec():
    by_path = dict(NODES)
    for entry in LIVE + IMMUTABLE:
        assert f".spec.{entry}".replace("samplers.*", "samplers[]") in by_path, entry


def test_every_field_of_the_spec_is_immutable_guarded_or_live():
    rules = [rule for rule, _ in change_rules()]
    never = [name for name in ("model", "data", "seed") if f"self.{name} == oldSelf.{name}" in rules]
    whole = [
        name
        for name in ("mode", "rewards", "algorithm", "generation", "timeScale", "monitoring", "credentials")
        if f"oldSelf.suspend || (self.{name} == oldSelf.{name})" in rules
    ]
    live = [
        "evaluation",
        "failurePolicy",
        "local",
        "suspend",
        "resume",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
    ]
    in_parts = ["samplers", "learner", "exchange"]  # pools come and go; their fields are guarded one by one
    fields = [info.alias or name for name, info in RunSpec.model_fields.items()]
    assert sorted([*never, *whole, *live, *in_parts]) == sorted(fields)
    guarded = "\n".join(rules)
    for name in ("self.learner.batch", "self.exchange.maxPendingGroups", "o.podTemplate == g.podTemplate"):
        assert name in guarded
    for name in ("learner.steps", "exchange.retention", "g.replicas", "g.delay", "g.availability"):
        assert name not in guarded
    assert not any(f"self.{name} " in guarded for name in live)


def test_a_run_that_ended_keeps_every_field_of_its_spec_but_its_time_to_live():
    (rule,) = [rule for _, rule, message in rules() if message.startswith("the run has ended")]
    fields = {info.alias or name for name, info in RunSpec.model_fields.items()}
    assert set(re.findall(r"self\.spec\.\??(\w+) ==", rule)) == fields - {"ttlSecondsAfterFinished"}
