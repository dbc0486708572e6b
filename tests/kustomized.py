"""What `kubectl kustomize` makes of a folder, for the few features that deploy/kubernetes uses; any other is refused.

kustomize is a Go program that no package index of ours has. Understood are `resources`, `namespace`, `images`
(`newName`, `newTag`), `configMapGenerator` and `secretGenerator` (`files`, `disableNameSuffixHash`) and `patches` by
strategic merge of one file each. Names of generated objects stay without the digest that kustomize adds to them and to
what refers to them.
"""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "secretGenerator", "patches"}
# Lists whose elements are merged by a key of theirs; every other list is replaced, where it is known to be.
MERGED_BY = {"containers": "name", "env": "name"}
REPLACED = {"tolerations"}
CLUSTER_WIDE = {"Namespace"}


def compose(folder: Path) -> list[Manifest]:
    """Give the objects of the kustomization in `folder`, in its order.

    Raises:
        ValueError: it uses a feature that is not understood here, or a patch has nothing that it fits.
    """
    kustomization = _one(folder / "kustomization.yaml")
    only(kustomization, KNOWN, f"{folder.name}/kustomization.yaml")
    objects = [made for name in kustomization.get("resources", ()) for made in _resource(folder / name)]
    for kind, generator in (("ConfigMap", "configMapGenerator"), ("Secret", "secretGenerator")):
        objects += [_generated(folder, kind, entry) for entry in kustomization.get(generator, ())]
    for entry in kustomization.get("patches", ()):
        only(entry, {"path"}, "patches")
        _patch(objects, _one(_inside(folder, entry["path"])))
    for entry in kustomization.get("images", ()):
        only(entry, {"name", "newName", "newTag"}, "images")
        _rename_image(objects, entry)
    for made in objects:
        if "namespace" in kustomization and made["kind"] not in CLUSTER_WIDE:
            made["metadata"]["namespace"] = kustomization["namespace"]
    return objects


def only(mapping: Manifest, known: set[str], where: str) -> None:
    """Refuse what is not understood."""
    if unknown := mapping.keys() - known:
        raise ValueError(f"{where}: {sorted(unknown)} is not understood")


def merge(base: Manifest, patch: Manifest) -> Manifest:
    """Give `base` with `patch` merged into it strategically."""
    merged = copy.deepcopy(base)
    for key, value in patch.items():
        if key not in merged:
            merged[key] = copy.deepcopy(value)
        elif isinstance(value, dict):
            merged[key] = merge(merged[key], value)
        elif isinstance(value, list):
            merged[key] = _merged_list(key, merged[key], value)
        elif value is None:
            raise ValueError(f"{key}: deleting by null is not understood")
        else:
            merged[key] = value
    return merged


def _merged_list(key: str, base: list[Any], patch: list[Any]) -> list[Any]:
    if key in REPLACED:
        return copy.deepcopy(patch)
    if key not in MERGED_BY:
        raise ValueError(f"{key}: how this list is merged is not understood")
    by = MERGED_BY[key]
    patches = {element[by]: element for element in patch}
    known = {element[by] for element in base}
    # kustomize puts what is new in front.
    fresh = [copy.deepcopy(element) for element in patch if element[by] not in known]
    return fresh + [merge(element, patches.get(element[by], {})) for element in base]


def _one(path: Path) -> Manifest:
    (loaded,) = _all(path)
    return loaded


def _all(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def _resource(path: Path) -> list[Manifest]:
    return compose(path) if path.is_dir() else _all(path)


def _inside(folder: Path, name: str) -> Path:
    """Files other than resources have to lie in the kustomization's own folder, or kustomize refuses them."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of {folder.name}")
    return path


def _generated(folder: Path, kind: str, entry: Manifest) -> Manifest:
    only(entry, {"name", "files", "options"}, kind)
    only(entry.get("options", {}), {"disableNameSuffixHash"}, f"{kind}: options")
    data = {}
    for file in entry["files"]:
        key, _, name = file.rpartition("=")
        raw = _inside(folder, name).read_bytes()
        data[key or Path(name).name] = raw.decode() if kind == "ConfigMap" else base64.b64encode(raw).decode()
    made: Manifest = {"apiVersion": "v1", "kind": kind, "metadata": {"name": entry["name"]}, "data": data}
    return made | ({"type": "Opaque"} if kind == "Secret" else {})


def _patch(objects: list[Manifest], patch: Manifest) -> None:
    found = [
        made
        for made in objects
        if (made["apiVersion"], made["kind"], made["metadata"]["name"])
        == (patch["apiVersion"], patch["kind"], patch["metadata"]["name"])
    ]
    if len(found) != 1:
        raise ValueError(f"{patch['kind']} {patch['metadata']['name']} is there {len(found)} times")
    objects[objects.index(found[0])] = merge(found[0], patch)


def _rename_image(objects: list[Manifest], entry: Manifest) -> None:
    for made in objects:
        for container in made.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            name, _, tag = container["image"].partition(":")
            if name == entry["name"]:
                container["image"] = f"{entry.get('newName', name)}:{entry.get('newTag', tag)}"
