"""The Hub's rules for the metadata of a card, as far as they are documented or its refusals are.

Sources: hub-docs' modelcard.md, datasetcard.md and spaces-config-reference.md; the list of licences from a refusal of
2026-05 (huggingface_hub issue 4218); languages and data set ids from refusals of 2026-09 (espnet_model_zoo PR 102).
"""

import re

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
other
""".split()
LANGUAGE = r"[a-z]{2,3}|code|multilingual"
REPO_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
SIZES += ["10B<n<100B", "100B<n<1T", "n>1T", "other"]


def card_errors(content: str, kind: str) -> list[str]:
    """What is wrong with the README.md of a "model", "dataset" or "space"."""
    match = REGEX_YAML_BLOCK.search(content)
    if match is None:
        return ["a Space needs metadata"] if kind == "space" else []
    try:
        data = yaml.safe_load(match[2])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    errors = [f'"{key}" is not allowed to be empty' for key, value in data.items() if value in (None, "", [])]
    _one_of(data, "license", LICENSES, errors)
    _match(data, "language", LANGUAGE, errors)
    for key in ("base_model", "datasets", "models"):
        _match(data, key, REPO_ID, errors)
    for key in ("tags", "widget", "model-index", "configs", "models", "datasets"):
        if key in data and not isinstance(data[key], list) and not (key == "datasets" and isinstance(data[key], str)):
            errors.append(f'"{key}" must be an array')
    if isinstance(data.get("model-index"), list):
        _check_model_index(data["model-index"], errors)
    if kind == "dataset":
        _one_of(data, "size_categories", SIZES, errors)
    if kind == "space":
        _check_space(data, errors)
    return errors


def _listed(data: dict, key: str) -> list:
    value = data.get(key, [])
    return value if isinstance(value, list) else [value]


def _one_of(data: dict, key: str, known: list[str], errors: list[str]):
    if any(value not in known for value in _listed(data, key)):
        errors.append(f'"{key}" must be one of [{", ".join(known)}, array]')


def _match(data: dict, key: str, pattern: str, errors: list[str]):
    for value in _listed(data, key):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            errors.append(f'"{key}" with value {value!r} is not valid')


def _check_model_index(index: list, errors: list[str]):
    def need(item: object, path: str, *keys: str) -> bool:
        missing = [key for key in keys if not isinstance(item, dict) or item.get(key) in (None, "", [])]
        errors.extend(f'"{path}.{key}" is required' for key in missing)
        return not missing

    for number, model in enumerate(index):
        if not need(model, f"model-index[{number}]", "name", "results"):
            continue
        for row, result in enumerate(model["results"]):
            path = f"model-index[{number}].results[{row}]"
            if not need(result, path, "task", "dataset", "metrics"):
                continue
            need(result["task"], f"{path}.task", "type")
            if need(result["dataset"], f"{path}.dataset", "type", "name"):
                _match(result["dataset"], "type", REPO_ID, errors)
            for column, metric in enumerate(result["metrics"]):
                need(metric, f"{path}.metrics[{column}]", "type", "value")


def _check_space(data: dict, errors: list[str]):
    if data.get("sdk") not in ("gradio", "docker", "static", "streamlit"):
        errors.append('"sdk" must be one of [gradio, streamlit, docker, static]')
    if data.get("sdk") == "gradio" and not re.fullmatch(r"\d+\.\d+\.\d+", str(data.get("sdk_version"))):
        errors.append('"sdk_version" must be a valid version')
    for key in ("colorFrom", "colorTo"):
        if data.get(key) not in COLORS:
            errors.append(f'"{key}" must be one of [{", ".join(COLORS)}]')
    if re.search(r"\w", str(data.get("emoji", "x"))):
        errors.append('"emoji" must be an emoji')
    if len(data.get("short_description", "")) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
