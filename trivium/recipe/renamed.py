"""Earlier names of kinds and settings: they keep working, and one line says the present name."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings, plain_types
from trivium.recipe.read import Written
from trivium.stages.parts.stage import Stage

Keys = tuple[str, ...]


class Renaming:
    """Translates earlier names in the stages of a recipe and collects what was translated."""

    def __init__(self) -> None:
        self.found: dict[Keys, tuple[str, str]] = {}
        """The place of every key or kind with an earlier name, with that name and the present one."""

    def notices(self, written: Written) -> tuple[str, ...]:
        """A line for every earlier name, with its place in the file."""
        return tuple(
            f"{written.place(keys)}: `{earlier}` is called `{present}` now; both work."
            for keys, (earlier, present) in self.found.items()
        )

    def stages(self, stages: Any, *, laid_over: bool = False) -> Any:
        """The stages with present names; with `laid_over`, an earlier name replaces the present one."""
        if not isinstance(stages, Mapping):
            return stages
        return {name: self._stage(stage, ("stages", str(name)), laid_over) for name, stage in stages.items()}

    def _stage(self, stage: Any, place: Keys, laid_over: bool) -> Any:
        if not isinstance(stage, Mapping) or not isinstance(stage.get("kind"), str):
            return stage
        kind = stage["kind"]
        if kind in Stage.formerly_kinds:
            present = Stage.formerly_kinds[kind]
            self.found[(*place, "kind")] = (kind, present)
            stage, kind = {**stage, "kind": present}, present
        model = Stage.kinds.get(kind)
        return stage if model is None else self._settings(stage, model, place, laid_over)

    def _settings(
        self, value: Mapping[Any, Any], model: type[BaseModel], place: Keys, laid_over: bool
    ) -> Any:
        earlier = model.formerly if issubclass(model, Settings) else {}
        result: dict[Any, Any] = {}
        for key, inside in value.items():
            present = earlier.get(key, key)
            if present != key:
                self.found[(*place, str(key))] = (str(key), present)
                if present in value and not laid_over:
                    raise TriviumError(
                        f"{'.'.join(place)}: `{key}` is an earlier name of `{present}`; write one of them."
                    )
            elif key in result:
                # An earlier name laid over the present one has already replaced it.
                continue
            result[present] = self._inside(inside, model, present, (*place, str(key)), laid_over)
        return result

    def _inside(self, value: Any, model: type[BaseModel], key: str, place: Keys, laid_over: bool) -> Any:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if key not in fields:
            return value
        return self._value(value, plain_types(fields[key].annotation), place, laid_over)

    def _value(self, value: Any, types: list[Any], place: Keys, laid_over: bool) -> Any:
        models = [one for one in types if isinstance(one, type) and issubclass(one, BaseModel)]
        if isinstance(value, Mapping):
            if models:
                return self._settings(value, models[0], place, laid_over)
            inner = _inner(types, dict)
            return {key: self._value(one, inner, (*place, str(key)), laid_over) for key, one in value.items()}
        if isinstance(value, list):
            inner = _inner(types, list)
            return [
                self._value(one, inner, (*place, str(number)), laid_over) for number, one in enumerate(value)
            ]
        return value


def _inner(types: list[Any], container: type) -> list[Any]:
    """The types of what such a container holds."""
    held = [get_args(one)[-1] for one in types if get_origin(one) is container and get_args(one)]
    return [one for annotation in held for one in plain_types(annotation)]
