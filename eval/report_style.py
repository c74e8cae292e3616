"""The style sheet of a report's page."""

STYLE = """
:root { color-scheme: light; --ink: #1c1f24; --faint: #626973; --rule: #d9dce1; --paper: #fff; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
.facts, .note { color: var(--faint); margin: 4px 0 14px; max-width: 84ch; }
.note { font-size: 13px; margin: 6px 0; }
.wide { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; font-weight: 600; font-size: 13px;
  min-width: 60px; }
th.name, td.name { text-align: left; white-space: normal; min-width: 150px; }
th:first-child { min-width: 0; }
td small { color: var(--faint); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 18px; }
figure { margin: 0; } .sample { margin: 0 0 18px; }
figcaption { font-size: 13px; color: var(--faint); }
video, img { max-width: 100%; display: block; margin-bottom: 4px; background: #16181c; }
svg { width: 100%; height: auto; font-family: inherit; }
svg .grid { stroke: var(--rule); } svg .dense { stroke: var(--faint); stroke-dasharray: 4 4; }
svg .way { fill: none; stroke-width: 1.5; opacity: 0.5; } svg .interval { stroke-width: 1.5; }
svg text { fill: var(--ink); font-size: 12px; } svg .small { fill: var(--faint); font-size: 11px; }
svg .title { font-weight: 600; }
pre { font-size: 12px; white-space: pre-wrap; } summary { margin-top: 36px; cursor: pointer; }
"""
