"""The server's side of the tab: which runs and tags there are, what one of them holds, and the page's files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import Request, Response

PLUGIN_NAME = "torch_rmt_spectra"
RECORD_VERSION = 1
"""These two stand in `torch_rmt.sinks.spectra_tab` as well, which writes what is read here; a test compares them."""

MOST_STEPS = 1000
"""Steps kept a run and tag, as for TensorBoard's scalars; its default for tensors is 10 or 100."""

_STATIC = Path(__file__).with_name("static")
_TYPES = {".js": "text/javascript", ".css": "text/css"}


class SpectraPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # tensorboard has no types
    """Serves the tab; all routes are below `data/plugin/torch_rmt_spectra/`.

    Routes:
        /runs: `{"runs": {run: [{"tag", "name", "last_step"}, ...]}, "most_steps"}`.
        /series?run=&tag=: `{"run", "tag", "points": [record, ...], "skipped"}`, each record as
            `torch_rmt.sinks.spectra_tab` wrote it, with "step" and "wall_time", in the order of steps.
        /static/...: the page.

    Args:
        context: TensorBoard's `TBContext`.
    """

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        kept = (context.sampling_hints or {}).get(PLUGIN_NAME)
        self._most_steps: int = MOST_STEPS if kept is None else kept

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes; every file has its own, so that no path leads elsewhere."""
        files = {f"/static/{file.name}": _file(file) for file in _STATIC.iterdir() if file.suffix in _TYPES}
        return {
            "/runs": Request.application(self._serve_runs),
            "/series": Request.application(self._serve_series),
            **files,
        }

    def is_active(self) -> bool:
        """Return False: TensorBoard itself looks for event files with our summaries."""
        return False

    def frontend_metadata(self) -> Any:
        """Return the tab's name and its module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="Spectra")

    def runs(self, environ: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `/runs` answers."""
        listed = self._provider.list_tensors(
            plugin_util.context(environ),
            experiment_id=plugin_util.experiment_id(environ),
            plugin_name=PLUGIN_NAME,
        )
        runs = {
            run: [
                {"tag": tag, "name": series.display_name or tag, "last_step": series.max_step}
                for tag, series in sorted(tags.items())
            ]
            for run, tags in sorted(listed.items())
        }
        return {"runs": runs, "most_steps": self._most_steps}

    def series(self, environ: Mapping[str, Any], run: str, tag: str) -> dict[str, Any]:
        """Return what `/series` answers.

        Raises:
            NotFoundError: there is no such run, or it has no such tag of ours.
        """
        read = self._provider.read_tensors(
            plugin_util.context(environ),
            experiment_id=plugin_util.experiment_id(environ),
            plugin_name=PLUGIN_NAME,
            downsample=self._most_steps or 2**31 - 1,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
        )
        data = read.get(run, {}).get(tag)
        if data is None:
            raise errors.NotFoundError(f"no spectra in run {run!r} under tag {tag!r}")
        points, skipped = records(data)
        return {"run": run, "tag": tag, "points": points, "skipped": skipped}

    def _serve_runs(self, request: Request) -> Response:
        return _json(request, self.runs(request.environ))

    def _serve_series(self, request: Request) -> Response:
        run, tag = request.args.get("run"), request.args.get("tag")
        if run is None or tag is None:
            raise errors.InvalidArgumentError("say which run and which tag: /series?run=...&tag=...")
        return _json(request, self.series(request.environ, run, tag))


class SpectraLoader(base_plugin.TBLoader):  # type: ignore[misc]  # tensorboard has no types
    """What the entry point names: asks TensorBoard to keep more than ten steps of our tensors, and loads the tab."""

    def fix_flags(self, flags: Any) -> None:
        """Add our plugin to `--samples_per_plugin`, unless the user named it there."""
        asked = getattr(flags, "samples_per_plugin", None)
        if isinstance(asked, dict):
            asked.setdefault(PLUGIN_NAME, MOST_STEPS)

    def load(self, context: Any) -> SpectraPlugin:
        """Return the plugin."""
        return SpectraPlugin(context)


def records(data: Iterable[Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the readable records among `TensorDatum`s by step, the last of each step, and how many were not."""
    found: dict[int, dict[str, Any]] = {}
    skipped = 0
    for datum in data:
        try:
            record = json.loads(datum.numpy.item())
            readable = record["version"] == RECORD_VERSION
        except (ValueError, TypeError, KeyError, AttributeError):
            readable = False
        if not readable:
            skipped += 1
            continue
        # A wall time that is not finite would be no JSON.
        wall_time = datum.wall_time if math.isfinite(datum.wall_time) else 0.0
        found[datum.step] = {"step": datum.step, "wall_time": wall_time, **record}
    return [found[step] for step in sorted(found)], skipped


def _json(request: Request, content: Mapping[str, Any]) -> Response:
    # TensorBoard's own conversion of dicts walks every number in Python.
    text = json.dumps(content, allow_nan=False)
    answer: Response = http_util.Respond(request, text, "application/json")
    return answer


def _file(path: Path) -> Callable[..., Any]:
    @Request.application
    def serve(request: Request) -> Response:
        answer: Response = http_util.Respond(request, path.read_bytes(), _TYPES[path.suffix])
        return answer

    return serve
