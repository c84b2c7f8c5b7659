"""One HTML page that needs nothing else: no network, no script, light and dark."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime

from rsotrain.report.claims import RULE, Finding
from rsotrain.report.comparison import LOSS, Group, best_groups, label_runs
from rsotrain.report.curves import AXES
from rsotrain.report.evidence import Verdict
from rsotrain.report.fairness import doubts, name_of
from rsotrain.report.front import NOTE as FRONT_NOTE
from rsotrain.report.front import front_cells, front_of
from rsotrain.report.runs import Run
from rsotrain.report.scaling import NOTE as SCALING_NOTE
from rsotrain.report.scaling import lines_of, scaling_cells
from rsotrain.report.tables import columns_of, notes, rows
from rsotrain.tracking.drawing import color_and_dashes
from rsotrain.tracking.escaping import for_html
from rsotrain.tracking.formats import format_count, format_seconds
from rsotrain.tracking.theme import SVG_TAG, variables, with_variables

TITLES = {
    "validation_loss": "Validation loss",
    "training_loss": "Training loss",
    "front": "Loss against optimizer state",
    "scaling": "Loss against model size",
    "memory": "Memory by part",
    "throughput": "Throughput",
    "subspace": "Subspace",
}


def page(
    groups: Sequence[Group],
    pictures: Mapping[str, str],
    title: str,
    findings: Sequence[Finding] = (),
    refresh_seconds: float | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """The page. ``pictures``: name -> SVG element; ``refresh_seconds``: a browser loads it again so often.

    ``left_out``: sentences about other runs.
    """
    runs = [run for group in groups for run in group.runs]
    again = f'<meta http-equiv="refresh" content="{refresh_seconds:g}">' if refresh_seconds else ""
    body = [
        f"<header><h1>{for_html(title)}</h1><p>{_subtitle(runs)}</p></header>",
        _tiles(groups),
        f"<section><h2>Comparison</h2>{_table(groups)}{_notes(groups, left_out)}</section>",
        *_claims(findings),
        *_pictures(pictures, {"front": _front(groups), "scaling": _scaling(groups)}),
        f"<section><h2>Runs</h2>{_runs(runs)}</section>",
        f"<footer>Written by rsotrain-report, {datetime.now():%Y-%m-%d %H:%M}.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"{again}<title>{for_html(title)}</title><style>{_css(pictures)}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _subtitle(runs: Sequence[Run]) -> str:
    states = [run.state.value for run in runs]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    models = dict.fromkeys(str(m) for run in runs if (m := run.config.get("model.name")) is not None)
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''} ({', '.join(counted)})", ", ".join(models)]
    return " · ".join(for_html(part) for part in parts if part)


def _tiles(groups: Sequence[Group]) -> str:
    """The best of a few pictures, large."""
    tiles = []
    for column in columns_of(groups):
        best = best_groups(groups, column)
        if column.metric in _TILES and len(best) == 1 and (statistic := best[0].statistic(column.metric)):
            tiles.append(
                f'<div class="tile"><span>{for_html(_TILES[column.metric])}</span>'
                f"<b>{for_html(column.form(statistic.mean))}</b><em>{for_html(name_of(best[0]))}</em></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


_TILES = {
    LOSS.metric: "lowest validation loss",
    "throughput/tokens_per_second": "most tokens per second",
    "memory/peak_bytes": "least peak memory",
    "memory/optimizer_state_bytes": "smallest optimizer state",
}


def _table(groups: Sequence[Group]) -> str:
    head = "".join(
        f"<th>{for_html(label)}</th>" for label in ["", *(c.label for c in columns_of(groups)), "runs"]
    )
    lines = []
    for index, (group, cells) in enumerate(rows(groups)):
        texts = "".join(
            f'<td class="best">{for_html(text)}</td>' if best else f"<td>{for_html(text)}</td>"
            for text, best in cells
        )
        lines.append(
            f"<tr><th>{_swatch(index)}{for_html(name_of(group))}</th>{texts}<td>{for_html(group.status)}</td></tr>"
        )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _swatch(index: int) -> str:
    """The line of group ``index`` in the curves; none for the dashes that CSS has not."""
    color, dashes = color_and_dashes(index)
    if dashes >= len(BORDERS):
        return ""
    return f'<i style="border-top:3px {BORDERS[dashes]} var(--series-{color + 1})"></i>'


BORDERS = ("solid", "dashed", "dotted")  # as drawing.DASHES, but for the last


def _notes(groups: Sequence[Group], left_out: Sequence[str]) -> str:
    """Why the comparison may not be fair, a line each, and what else there is to know."""
    lines = "".join(f"<li>{for_html(sentence)}</li>" for sentence in doubts(groups))
    paragraphs = [" ".join(notes(groups)), *left_out]
    return (f'<ul class="notes doubts">{lines}</ul>' if lines else "") + "".join(
        f'<p class="notes">{for_html(text)}</p>' for text in paragraphs if text
    )


def _claims(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    lines = []
    for number, finding in enumerate(findings, start=1):
        claim = f"{number}. {for_html(finding.claim)} <span>({for_html(finding.paper)})</span>"
        lines.append(f'<tr class="claim"><th>{claim}</th>{_verdict(finding.verdict)}<td></td></tr>')
        lines += [
            f"<tr><th>{for_html(part.statement)}</th>{_verdict(part.verdict)}<td>{for_html(part.figures)}</td></tr>"
            for part in finding.parts
        ]
    table = f'<table class="claims"><tbody>{"".join(lines)}</tbody></table>'
    return [
        "<section><h2>The papers' claims</h2>"
        f'<div class="scroll">{table}</div><p class="notes">{for_html(RULE)}</p></section>'
    ]


def _verdict(verdict: Verdict) -> str:
    return f'<td class="verdict {verdict.name}">{verdict.value}</td>'


def _front(groups: Sequence[Group]) -> str:
    """The table to the picture of loss against optimizer state."""
    heads, lines = front_cells(front_of(groups))
    named = [
        (f"{_swatch(row.index)}{'• ' if row.on_front else ''}{for_html(name_of(row.group))}", cells)
        for row, cells in lines
    ]
    return _below(heads, named, FRONT_NOTE)


def _scaling(groups: Sequence[Group]) -> str:
    """The table to the picture of loss against model size."""
    heads, lines = scaling_cells(lines_of(groups))
    return _below(heads, [(for_html(name), cells) for name, cells in lines], SCALING_NOTE)


def _below(heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]], note: str) -> str:
    """A table and a note below a picture. ``lines``: of each the HTML of its name, and its cells' texts."""
    head = "".join(f"<th>{for_html(text)}</th>" for text in ["", *heads])
    body = "".join(
        f"<tr><th>{name}</th>" + "".join(f"<td>{for_html(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in lines
    )
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{table}</table></div><p class="notes">{for_html(note)}</p>'


def _pictures(pictures: Mapping[str, str], below: Mapping[str, str]) -> list[str]:
    """A section each; those of one metric over several axes share one, with tabs.

    ``below``: name -> what stands below a picture.
    """
    sections: dict[str, list[str]] = {}
    for name in pictures:
        sections.setdefault(name.split("_by_")[0], []).append(name)
    out = []
    for section, names in sections.items():
        if len(names) == 1:
            content = _adapted(pictures[names[0]]) + below.get(section, "")
        else:
            labels = {f"{section}_by_{axis.name}": axis.label for axis in AXES}
            buttons = "".join(
                f'<input type="radio" name="{section}" id="{name}"{" checked" if name == names[0] else ""}>'
                f'<label for="{name}">{for_html(labels[name])}</label>'
                for name in names
            )
            panes = "".join(f'<div class="pane {name}">{_adapted(pictures[name])}</div>' for name in names)
            content = f'<div class="tabs">{buttons}{panes}</div>'
        out.append(f"<section><h2>{for_html(TITLES[section])}</h2>{content}</section>")
    return out


def _adapted(svg: str) -> str:
    """A picture as an element of the page: as wide as it, in its colours, without ids that collide.

    On a narrow screen it is scrolled, since its letters would be too small.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = with_variables(SVG_TAG.sub(lambda tag: _OWN_ID.sub("", tag[0]), svg))
    return f'<div class="scroll">{svg}</div>'


_OWN_ID = re.compile(r'\bid="(figure|axes|patch|text|line2d|legend|matplotlib|xtick|ytick)[^"]*"')


def _runs(runs: Sequence[Run]) -> str:
    lines = []
    for run, label in zip(runs, label_runs(runs), strict=True):
        loss, seconds = run.last(LOSS.metric), run.last("time")
        cells = [
            f'<td><span class="state {run.state.value}">{run.state.value}</span></td>',
            f"<td>{format_count(run.step)}/{format_count(run.steps)}</td>",
            f"<td>{'–' if loss is None else LOSS.form(loss)}</td>",
            f"<td>{'–' if seconds is None else format_seconds(seconds)}</td>",
            f'<td class="settings">{for_html(label)}</td>',
        ]
        lines.append(f'<tr><th title="{for_html(run.path)}">{for_html(run.name)}</th>{"".join(cells)}</tr>')
    head = "".join(
        f"<th>{label}</th>" for label in ("", "state", "step", "validation loss", "wall time", "what it is")
    )
    return (
        f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _css(pictures: Mapping[str, str]) -> str:
    shown = ",".join(f"#{name}:checked~.{name}" for name in pictures if "_by_" in name)
    return (
        f":root{{{variables(dark=False)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{variables(dark=True)}}}}}"
        f"{_RULES}{shown + '{display:block}' if shown else ''}"
    )


_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 32px}
@media (max-width:600px){main{padding:24px 14px}}
h1{font-size:26px;line-height:1.2;margin:0}
h2{font-size:17px;margin:0 0 12px}
header p,footer,.notes{color:var(--muted);margin:4px 0 0}
section{margin-top:40px}
footer{margin-top:48px;padding-top:12px;border-top:1px solid var(--grid);font-size:13px}
.notes{font-size:13px;margin-top:10px}
.doubts{padding-left:18px;color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin-top:28px}
.tile{border:1px solid var(--grid);border-radius:10px;padding:12px 16px;display:flex;flex-direction:column}
.tile span{color:var(--muted);font-size:13px}
.tile b{font-size:24px;line-height:1.35;font-weight:600}
.tile em{font-style:normal;font-size:13px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;white-space:nowrap;font-weight:400;
border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-size:12.5px}
th:first-child{text-align:left;padding-left:0}
td:last-child{color:var(--muted)}
tbody th{font-weight:500;white-space:normal;overflow-wrap:anywhere;min-width:170px;max-width:420px}
td.best{font-weight:700;position:relative}
td.best::after{content:"★";color:var(--series-4);font-size:9px;position:absolute;right:0;top:9px}
i{display:inline-block;width:20px;vertical-align:middle;margin-right:8px}
.runs td,.runs th{font-size:13px}
.runs td.settings{text-align:left;white-space:normal;min-width:220px;overflow-wrap:anywhere}
.runs thead th:last-child{text-align:left}
.claims td,.claims th{white-space:normal;text-align:left;vertical-align:top}
.claims th{padding-left:16px!important;min-width:240px;max-width:none;overflow-wrap:normal}
.claims td:last-child{min-width:240px}
.claims .claim th{padding-left:0!important;font-weight:650}
.claims .claim span{color:var(--muted);font-weight:400;white-space:nowrap}
.claims .verdict{white-space:nowrap;color:var(--muted)}
.claims .claim .verdict{font-weight:650}
.claims .confirmed{color:var(--series-8)}
.claims .refuted{color:var(--series-6)}
.state::before{content:"";display:inline-block;width:7px;height:7px;border-radius:50%;margin-right:6px;
background:var(--muted)}
.finished::before{background:var(--series-3)}
.running::before{background:var(--series-1)}
.stopped::before{background:var(--series-4)}
.failed::before,.lost::before{background:var(--series-6)}
svg{display:block;width:100%;max-width:700px;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
.tabs{display:flow-root}
.tabs input{position:absolute;opacity:0}
.tabs label{display:inline-block;padding:3px 12px;margin:0 6px 10px 0;border:1px solid var(--grid);
border-radius:99px;font-size:13px;color:var(--muted);cursor:pointer}
.tabs input:checked+label{color:var(--surface);background:var(--ink);border-color:var(--ink)}
.tabs input:focus-visible+label{outline:2px solid var(--series-1);outline-offset:2px}
.pane{display:none}
@media print{.pane{display:block}.tabs label{display:none}svg{min-width:0}}
"""
