"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, text, parent, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    if (parent) parent.append(element);
    return element;
  };
  const option = (select, text, value) => { make("option", text, select).value = value; };
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");  // plotly reads some HTML
  const short = (text, most) => (text.length > most ? text.slice(0, most) + "…" : text);
  const wrapped = (text) => escape(short(text, 420)).replace(/\s+/g, " ").replace(/(.{1,64})(\s|$)/g, "$1<br>");
  const named = (measure) => (measure === "logp_per_token" ? "log-prob at start, nats / token" : measure.replaceAll("_", " "));
  const shown = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(Math.abs(x) < 100 ? digits : 1));
  const data = read("data");
  const COLOURS = ["#2f6fde", "#e0702c", "#2d9a5f", "#b04fc6", "#c9a227", "#d2415c", "#3aa6b9", "#8a6d3b", "#6b7280", "#7a5cff"];
  const drawings = [];
  let ready = false;  // all is there, so that each chart is drawn once
  const parsed = new Map();
  const texts = (listed) => {  // a prompt's responses, read when they are looked at
    if (!parsed.has(listed.block)) parsed.set(listed.block, read(`group-${listed.block}`));
    return parsed.get(listed.block);
  };
  const runs = Object.entries(data.runs);
  const evaluations = Object.entries(data.evaluations);
  const folders = [...new Set([...runs, ...evaluations].map(([name]) => name))];  // a folder has one colour everywhere
  const colourOf = (name) => COLOURS[folders.indexOf(name) % COLOURS.length];
  const key = (id, name, colour, mark = "●") => {  // one line of a section's legend
    const item = make("span", undefined, at(id), "key");
    make("span", mark, item).style.color = colour;
    make("span", name, item);
  };

  // --- charts ---------------------------------------------------------------------------------------------

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = (title, more) => ({ title: { text: title, standoff: 8 }, gridcolor: style("--line"), linecolor: style("--line"), zerolinecolor: style("--line"), automargin: true, ...more });
  let drawn = Promise.resolve();
  const pause = () => new Promise((go) => { setTimeout(go); });  // the page can be read and scrolled between two charts
  function draw(...what) {
    drawn = drawn.then(pause).then(() => drawNow(...what));
    return drawn;
  }
  function drawNow(id, traces, x, y, more = {}) {
    const layout = {
      paper_bgcolor: style("--paper"), plot_bgcolor: style("--paper"), font: { color: style("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: more.margin ?? { l: 56, r: 16, t: 16, b: 46 }, xaxis: axis(x, more.xaxis), yaxis: axis(y, more.yaxis),
      showlegend: false, hovermode: more.hovermode ?? "closest",
      hoverlabel: { align: "left", bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") } }, annotations: more.annotations ?? [],
    };
    return Plotly.react(at(id), traces, layout, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] });
  }
  function always(drawing) { drawings.push(drawing); }

  // --- quality against diversity --------------------------------------------------------------------------

  // a colour a folder where each holds a before and an after, else one a file of responses; the baseline is hollow
  const byFolder = evaluations.length > 1 && evaluations.every(([, e]) => e.baseline && Object.keys(e.mean).length === 2);
  const points = evaluations.flatMap(([file, e], f) => Object.keys(e.mean).map((name) => ({
    name: evaluations.length > 1 ? `${file}: ${name}` : name, colour: byFolder ? colourOf(file) : "",
    file: f, baseline: name === e.baseline, mean: e.mean[name], interval: e.interval[name],
  })));
  if (!byFolder) points.forEach((p, i) => { p.colour = COLOURS[i % COLOURS.length]; });
  function against(id, x, y) {
    const error = (p, m) => ({ type: "data", symmetric: false, array: [p.interval[m] ? p.interval[m][1] - p.mean[m] : 0], arrayminus: [p.interval[m] ? p.mean[m] - p.interval[m][0] : 0], thickness: 1, width: 3 });
    const there = points.filter((p) => typeof p.mean[x] === "number" && typeof p.mean[y] === "number");
    if (!there.length) { at(id).remove(); return; }
    const fromBaseline = there.filter((p) => !p.baseline).flatMap((p) => there.filter((q) => q.baseline && q.file === p.file).map((q) => [q, p]));
    always(() => draw(id, [
      ...fromBaseline.map(([q, p]) => ({ x: [q.mean[x], p.mean[x]], y: [q.mean[y], p.mean[y]], mode: "lines", hoverinfo: "skip", line: { color: p.colour, width: 1.5, dash: "dot" } })),
      ...there.map((p) => ({
        x: [p.mean[x]], y: [p.mean[y]], error_x: error(p, x), error_y: error(p, y), mode: "markers",
        marker: { size: 12, color: p.colour, symbol: p.baseline ? "circle-open" : "circle", line: { width: p.baseline ? 2.5 : 0, color: p.colour } },
        hovertemplate: `${escape(p.name)}<br>${named(x)} %{x:.3f}<br>${named(y)} %{y:.3f}<extra></extra>`,
      })),
    ], named(x), named(y)));
  }
  if (points.length) {
    const has = (m) => points.some((p) => typeof p.mean[m] === "number");
    const quality = ["quality", "logp_per_token", "num_words"].find(has);
    against("semantic", "semantic_diversity", quality);
    against("style", "style_diversity", quality);
    at("how").textContent = `Means over prompts with 95 % intervals${quality === "quality" ? "; up and right is better" : ""}. ${points.some((p) => p.baseline) ? "Hollow: before; a dotted line leads to after." : ""}`;
    if (byFolder) evaluations.forEach(([file]) => key("points", file, colourOf(file)));
    else points.forEach((p) => key("points", p.name, p.colour, p.baseline ? "○" : "●"));
    const measures = [...new Set(points.flatMap((p) => Object.keys(p.mean)))];
    const head = make("tr", undefined, at("numbers"));
    make("th", "measure", head);
    points.forEach((p) => make("th", p.name, head));
    measures.forEach((m) => {
      const row = make("tr", undefined, at("numbers"));
      make("td", named(m), row);
      points.forEach((p) => { const i = p.interval[m]; make("td", p.mean[m] === null || p.mean[m] === undefined ? "–" : `${shown(p.mean[m])}  [${shown(i?.[0])}, ${shown(i?.[1])}]`, row, "number"); });
    });
    if (!has("quality")) at("how").textContent += ` No quality was measured (ddpo score gives it): ${named(quality)} stands in its place.`;
  }

  // --- training -------------------------------------------------------------------------------------------

  const LABELS = { loss: "loss", margin: "reward margin, nats", accuracy: "accuracy", tokens_per_s: "tokens / s" };
  Object.entries(LABELS).forEach(([name, label]) => {
    const traces = runs.flatMap(([run, r]) => {
      const colour = colourOf(run), found = [];
      if (r.curves[name]) found.push({ x: r.steps, y: r.curves[name], mode: r.steps.length > 60 ? "lines" : "lines+markers", name: escape(run), line: { color: colour, width: 1.8 }, marker: { size: 5 }, connectgaps: false });
      if (r.eval_curves[name]) found.push({ x: r.eval_steps, y: r.eval_curves[name], mode: "lines+markers", name: escape(run) + ", held out", line: { color: colour, dash: "dot" }, marker: { size: 7, symbol: "diamond" } });
      return found;
    });
    if (!traces.length) return;
    make("div", undefined, at("curves"), "chart").id = `curve-${name}`;
    always(() => draw(`curve-${name}`, traces, "step", label, { hovermode: "x unified" }));
  });
  const heldOut = runs.some(([, r]) => r.eval_steps.length);
  if (runs.length > 1 || heldOut) runs.forEach(([run]) => key("lines", run, colourOf(run)));
  if (heldOut) key("lines", "held out", "inherit", "◇");
  if (runs.length && !at("curves").children.length) make("p", "The run has not taken a step yet.", at("curves"), "quiet");

  // --- data -----------------------------------------------------------------------------------------------

  function bars(id, histogram, title, note) {
    const { edges, counts } = histogram;
    const middles = counts.map((_, i) => (edges[i] + edges[i + 1]) / 2);
    const annotations = note ? [{ text: escape(note), xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "top", showarrow: false }] : [];
    return draw(id, [{ type: "bar", x: middles, y: counts, width: counts.map((_, i) => edges[i + 1] - edges[i]), marker: { color: COLOURS[0] }, hovertemplate: "%{x:.3f}: %{y}<extra></extra>" }], title, "count", { annotations });
  }
  const prepared = Object.entries(data.prepared);
  if (prepared.length) {
    let group, current, response;
    const picked = () => data.prepared[at("prepared").value];
    prepared.forEach(([name]) => option(at("prepared"), name, name));
    at("prepared").parentElement.hidden = prepared.length === 1;
    const overview = () => {
      const p = picked(), zero = p.zero_share === null ? "" : `, ${(100 * p.zero_share).toFixed(0)} % of the pairs have weight 0`;
      at("summary").textContent = `${p.summary.prompts} prompts, ${p.summary.responses} responses, ${p.summary.pairs} pairs${zero}.`;
      at("legend").textContent = p.map_of
        ? `Two principal components of the responses' ${p.map_of}: near is alike. Colour: deviation; size: score; a line leads from a pair's rejected response to its chosen one (a triangle), thicker with its weight (the 200 heaviest); a diamond is in no pair.`
        : `There is no map: ${p.no_map}.`;
      at("map").hidden = !p.map_of;
      for (const [id, what, title] of [["weights", p.weights, "weight of a pair"], ["deviations", p.deviations, "deviation of a response"]]) {
        at(id).hidden = !what;
        if (what) bars(id, what, title, id === "weights" && p.zero_share !== null ? `zero: ${(100 * p.zero_share).toFixed(0)} %` : "");
      }
    };
    const list = (only) => {
      at("prompt").replaceChildren();
      picked().groups.forEach((g, i) => { if (!only || only.has(i)) option(at("prompt"), `${i + 1}. ${short(g.prompt, 90)}`, i); });
    };
    const showGroup = () => {
      const i = at("prompt").value;
      if (i === "") return;
      current = Number(i);
      group = block(current);
      at("asked").textContent = group.prompt;
      at("response").replaceChildren();
      group.texts.forEach((_, j) => option(at("response"), `${j + 1}: ${role(j)}, score ${shown(group.scores[j], 2)}, deviation ${shown(group.deviations[j])}`, j));
      const found = group.texts.findIndex(matches);
      showResponse(found >= 0 ? found : Math.max(0, group.texts.findIndex((_, j) => role(j) === "chosen")));
    };
    const showResponse = (j) => {
      response = j;
      at("response").value = j;
      at("reading").textContent = group.texts[j];
      drawMap();
    };
    const block = (i) => texts(picked().groups[i]);
    const is = (i, side) => group.pairs.some((pair) => pair[side] === i);
    const role = (i) => (is(i, 0) ? (is(i, 1) ? "chosen and rejected" : "chosen") : is(i, 1) ? "rejected" : "in no pair");
    const matches = (text) => { const words = at("search").value.trim().toLowerCase(); return words && text.toLowerCase().includes(words); };
    const drawMap = () => {
      if (!ready || !picked().map_of) return;
      const scores = group.scores.filter((s) => s !== null), low = Math.min(...scores), high = Math.max(...scores);
      const size = group.scores.map((s) => (s === null ? 9 : high > low ? 9 + (15 * (s - low)) / (high - low) : 14));
      const RED = "#d2415c", strong = style("--accent");
      const heaviest = Math.max(1e-9, ...group.pairs.map((p) => p[2]));
      const lines = [...group.pairs].sort((a, b) => b[2] - a[2]).slice(0, 200).map(([c, r, w]) => ({ x: [group.x[r], group.x[c]], y: [group.y[r], group.y[c]], mode: "lines", hoverinfo: "skip", showlegend: false, line: { color: style("--quiet"), width: 0.4 + (2.4 * w) / heaviest } }));
      const dots = {
        x: group.x, y: group.y, mode: "markers", showlegend: false,
        text: group.texts.map((t, i) => `${role(i)}, score ${shown(group.scores[i], 2)}, deviation ${shown(group.deviations[i])}<br>${wrapped(t)}`), hovertemplate: "%{text}<extra></extra>",
        marker: { size, opacity: 0.95, symbol: group.texts.map((_, i) => ({ rejected: "circle", "in no pair": "diamond" })[role(i)] ?? "triangle-up"), color: group.deviations, cmin: 0, cmax: Math.max(1e-9, ...group.deviations), colorscale: "Viridis", colorbar: { title: { text: "deviation", side: "right" }, thickness: 12, outlinewidth: 0 },
          line: { width: group.texts.map((t, i) => (i === response || matches(t) ? 3 : 0.8)), color: group.texts.map((t, i) => (matches(t) ? RED : i === response ? strong : style("--ink"))) } },
      };
      draw("map", [...lines, dots], "", "", { margin: { l: 16, r: 8, t: 16, b: 16 }, xaxis: { showticklabels: false, zeroline: false, showgrid: false }, yaxis: { showticklabels: false, zeroline: false, showgrid: false, scaleanchor: "x" } }).then((plot) => {
        plot.removeAllListeners("plotly_click");
        plot.on("plotly_click", (event) => showResponse(event.points[0].pointNumber));
      });
    };
    const search = () => {
      const words = at("search").value.trim().toLowerCase();
      if (!words) { at("hits").textContent = ""; list(); at("prompt").value = current; drawMap(); return; }
      const found = new Set();
      picked().groups.forEach((g, i) => { if (matches(g.prompt) || block(i).texts.some(matches)) found.add(i); });
      at("hits").textContent = `${found.size} prompt${found.size === 1 ? "" : "s"}`;
      list(found);
      if (found.size) { at("prompt").value = found.has(current) ? current : [...found][0]; showGroup(); }
    };
    let waiting;
    at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 150); });
    at("prompt").addEventListener("change", showGroup);
    at("response").addEventListener("change", () => showResponse(Number(at("response").value)));
    at("prepared").addEventListener("change", () => { clearTimeout(waiting); at("search").value = ""; at("hits").textContent = ""; current = 0; overview(); list(); showGroup(); });
    list();
    showGroup();
    always(overview);
    always(drawMap);
  }

  // --- samples --------------------------------------------------------------------------------------------

  const files = Object.keys(data.responses);
  if (files.length) {
    const seen = new Set();
    const prompts = files.flatMap((name) => data.responses[name]).filter((g) => !seen.has(g.prompt) && seen.add(g.prompt));
    prompts.forEach((g, i) => option(at("sample"), `${i + 1}. ${short(g.prompt, 90)}`, i));
    for (const id of ["left", "right"]) files.forEach((name) => option(at(id), name, name));
    at("left").value = files[0];
    at("right").value = files.length > 1 ? files[1] : files[0];
    const after = files.find((name) => name.endsWith("after"));
    if (after) at("right").value = after;
    const show = () => {
      at("samples").replaceChildren();
      const asked = prompts[at("sample").value];
      const names = at("left").value === at("right").value ? [at("left").value] : [at("left").value, at("right").value];
      names.forEach((name) => {
        const column = make("div", undefined, at("samples"), "column");
        make("h4", name, column);
        const found = data.responses[name].find((g) => g.prompt === asked.prompt);
        if (!found) { make("p", "has no response to this prompt", column, "quiet"); return; }
        const group = texts(found);
        if (group.texts.length > 50) make("p", `the first 50 of ${group.texts.length}`, column, "quiet");
        group.texts.slice(0, 50).forEach((text, i) => {
          const article = make("article", undefined, column);
          if (group.scores[i] !== null && group.scores[i] !== undefined) make("p", `score ${shown(group.scores[i], 2)}`, article, "quiet");
          make("pre", text, article);
        });
      });
    };
    ["sample", "left", "right"].forEach((id) => at(id).addEventListener("change", show));
    show();
  }

  // --- light and dark -------------------------------------------------------------------------------------

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  ready = true;
  const theme = (on) => {
    document.documentElement.classList.toggle("dark", on);
    document.documentElement.dataset.ready = "no";
    drawings.forEach((drawing) => drawing());
    const last = drawn;
    last.then(() => { if (last === drawn) document.documentElement.dataset.ready = "yes"; });
  };
  dark.addEventListener("change", (event) => theme(event.matches));
  at("theme").addEventListener("click", () => theme(!document.documentElement.classList.contains("dark")));
  theme(dark.matches);
})();
