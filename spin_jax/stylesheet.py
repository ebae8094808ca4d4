"""How the report looks: on a phone and a desk, light and dark, and on paper, which is light."""

from spin_jax.figures import PALETTE

# PALETTE's colors on a dark ground: the same hues, 3:1 and more.
_DARK = ("#62b0f2", "#f0914c", "#42c79d", "#e48fca", "#d8b54e", "#a3d5f5", "#f58489", "#a9b2bb")


def _colors(palette: tuple[str, ...]) -> str:
    return " ".join(f"--c{n}: {color};" for n, color in enumerate(palette))


STYLE = f"""
:root {{
  color-scheme: light dark;
  --paper: #ffffff; --sheet: #f4f6f8; --text: #1b1f23; --quiet: #57606a; --grid: #dde1e6; --line: #c9cfd6;
  --mark: #e6f0fa; {_colors(PALETTE)}
}}
@media screen and (prefers-color-scheme: dark) {{
  :root {{
    --paper: #14171a; --sheet: #1c2126; --text: #e7eaed; --quiet: #a2abb4; --grid: #2d343b; --line: #3d464f;
    --mark: #1d3348; {_colors(_DARK)}
  }}
}}
@media print {{ :root {{ color-scheme: light; }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{
  margin: 0 auto; padding: 0 1rem 3rem; max-width: 75rem; background: var(--paper); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 1.6rem 0 .5rem; }}
h2 {{ font-size: 1.25rem; line-height: 1.25; margin: 2.4rem 0 .8rem; }}
p {{ margin: .3rem 0; max-width: 46rem; }}
small, .note, footer, figure p, .sub {{ color: var(--quiet); }}
small {{ font-size: .8em; }}
.note, footer, figure p {{ font-size: .9rem; }}
footer {{ margin-top: 3rem; }}
a {{ color: var(--c0); }}
code, .code td, .code tbody th {{
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem;
}}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1rem; font-size: .9rem; }}
nav a {{ padding: .2rem 0; }}
:focus-visible {{ outline: 2px solid var(--c0); outline-offset: 2px; }}

.tiles {{
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem; margin: 1rem 0;
  max-width: 60rem;
}}
.tiles div {{
  background: var(--sheet); border-radius: .5rem; padding: .6rem .9rem; font-size: .9rem; display: grid;
  grid-template-rows: subgrid; grid-row: span 4; row-gap: 0;
}}
.tiles dt {{ color: var(--quiet); line-height: 1.3; }}
.tiles dd {{ margin: 0; }}
.tiles dt + dd {{ font-size: 1.7rem; font-weight: 600; line-height: 1.35; }}

.scroll {{ overflow-x: auto; max-width: 100%; margin: .6rem 0; }}
.tables {{ min-width: calc(6rem + var(--columns) * 3.6rem); max-width: calc(17rem + var(--columns) * 7rem); }}
table {{
  border-collapse: collapse; font-size: .88rem; line-height: 1.35; width: 100%; table-layout: fixed;
  margin-bottom: 1.2rem; break-inside: avoid;
}}
th, td {{
  padding: .2rem .35rem; text-align: right; font-weight: 400; vertical-align: top; overflow-wrap: break-word;
}}
th:first-child {{
  text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0;
  width: 38%;
}}
.tables:not(.few, .code) th:first-child {{ width: 9rem; }}
.code th:first-child {{ width: 36%; }}
caption {{ text-align: left; font-weight: 600; padding: .2rem 0; }}
td {{ white-space: nowrap; }}
thead th {{ border-bottom: 1px solid var(--line); vertical-align: bottom; color: var(--quiet); }}
tr.sub th {{ padding-left: .8rem; color: var(--quiet); }}
td.final, th.final {{ background: var(--mark); font-weight: 600; white-space: nowrap; }}
.sub td.final {{ font-weight: 400; }}
td small {{ display: block; }}
.code {{ min-width: calc(10rem + var(--columns) * 8rem); max-width: calc(20rem + var(--columns) * 20rem); }}
.code th, .code td {{ text-align: left; overflow-wrap: anywhere; white-space: normal; }}
.code tr + tr > * {{ border-top: 1px solid var(--grid); }}

.figures {{
  display: grid; gap: 1.6rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}}
figure {{
  margin: 0; min-width: 0; display: grid; grid-template-rows: subgrid; grid-row: span 3; gap: .3rem;
  break-inside: avoid;
}}
figcaption {{ line-height: 1.35; }}
figcaption ul {{
  list-style: none; margin: .1rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem;
  font-size: .85rem;
}}
figure p {{ margin: 0; line-height: 1.4; }}
figure > svg {{ display: block; width: 100%; height: auto; align-self: end; }}
figure > svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
figure > svg text {{ font-family: inherit !important; fill: currentColor; }}
.key {{ width: 26px; height: 10px; margin-right: .35rem; fill: none; }}

.samples {{
  display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  margin-top: .8rem;
}}
.samples.long {{ grid-template-columns: minmax(0, 1fr); }}
article {{ background: var(--sheet); border-radius: .5rem; padding: .7rem .9rem; min-width: 0; }}
.prompt {{ font-weight: 600; white-space: pre-wrap; margin-bottom: .4rem; }}
.prompt p {{ max-width: none; }}
.prompt b {{ color: var(--quiet); font-size: .85rem; }}
.samples dl {{ margin: 0; display: grid; gap: .1rem .8rem; }}
.samples dt {{ color: var(--quiet); font-size: .85rem; }}
.samples dd {{ margin: 0; white-space: pre-wrap; }}
.samples .human dd {{ font-weight: 600; }}
.short dl > div {{ display: grid; grid-template-columns: 6rem minmax(0, 1fr); align-items: baseline; }}
.long .prompt {{ font-weight: 400; margin-bottom: .8rem; max-height: 14rem; overflow-y: auto; }}
.long dl {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: 1rem 1.2rem; }}
.long dl > div {{ border-top: 1px solid var(--line); padding-top: .3rem; }}
.long .human {{ border-color: var(--text); }}
.long dd {{ font-size: .9rem; max-height: 16.9rem; overflow-y: auto; }}
.long .human dd {{ font-weight: 400; }}
.long dt {{ font-weight: 600; }}
.mark {{ color: var(--c2); font-size: .85rem; }}

.facts {{
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.2rem; margin: 0 0 1rem;
  font-size: .95rem;
}}
.facts dt {{ color: var(--quiet); }}
.facts dd {{ margin: 0; }}
details {{ margin: 1rem 0; }}
summary {{ cursor: pointer; padding: .3rem 0; }}

@media (max-width: 30rem) {{
  .tiles {{ grid-template-columns: 1fr; }}
  .tiles div {{ grid-template: none / 1fr auto; grid-row: auto; column-gap: 1rem; }}
  .tiles dt + dd {{ grid-column: 2; grid-row: 1 / span 3; align-self: center; }}
  table {{ font-size: .82rem; }}
  .tables:not(.code) th:first-child {{ width: 6rem; }}
  th, td {{ padding: .2rem .25rem; }}
  td.final {{ font-weight: 400; }}
}}
@media (min-width: 70rem) {{
  .tables:not(.few, .code) th:first-child {{ width: 15rem; }}
  .few {{ max-width: none; columns: 2; column-gap: 3rem; }}
}}

@media print {{
  @page {{ margin: 14mm; }}
  html {{ font-size: 9.5pt; }}
  body {{ max-width: none; padding: 0; }}
  h1 {{ margin-top: 0; }}
  h2 {{ margin-top: 1.6rem; break-after: avoid; }}
  p {{ max-width: none; }}
  nav {{ display: none; }}
  .tiles {{ grid-template-columns: repeat(4, 1fr); max-width: none; }}
  .scroll {{ overflow: visible; }}
  .tables {{ min-width: 0; max-width: none; }}
  .few {{ columns: 2; column-gap: 2rem; }}
  .code th:first-child {{ width: 46%; }}
  th:first-child {{ position: static; }}
  tr, article, .tiles div {{ break-inside: avoid; }}
  .long article {{ break-inside: auto; }}
  .long dd, .long .prompt {{ max-height: none; overflow: visible; }}
  .figures {{ grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem 1.8rem; }}
  figure > svg {{ max-height: 56mm; }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  .tiles div, article, td.final, th.final {{ print-color-adjust: exact; }}
}}
"""
