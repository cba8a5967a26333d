// SPDX-License-Identifier: Apache-2.0
// The page of `noether-writer report`: it makes all elements of the data, and gives names and values to them as text.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const colours = 10;
  // Runs beyond the colours have the same ones, with other dashes.
  const dashes = [[], [6, 4], [2, 3], [9, 3, 2, 3]];
  const room = { left: 62, right: 12, top: 10, bottom: 34 };
  const state = { smooth: 0, log: false, zoom: null, hidden: new Set() };

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (typeof value === "boolean") made.toggleAttribute(key, value);
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  // Six digits that count.
  function short(value) {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
    return String(Number(value.toPrecision(6)));
  }

  function size(bytes) {
    for (const [unit, shift] of [["TiB", 40], ["GiB", 30], ["MiB", 20], ["KiB", 10]]) {
      if (bytes >= 2 ** shift) return `${(bytes / 2 ** shift).toFixed(1)} ${unit}`;
    }
    return `${bytes} B`;
  }

  const time = (seconds) => new Date(seconds * 1000).toLocaleString();

  // MARK: Data

  function summed(steps) {
    let place = 0;
    return Float64Array.from(steps, (step) => (place += step));
  }

  const odd = { inf: Infinity, "-inf": -Infinity };
  const number = (value) => (typeof value === "number" ? value : odd[value] ?? NaN);

  for (const key of data.keys) {
    key.curves = key.curves.map((curve) => {
      if (!curve) return null;
      const read = (part) => ({ x: summed(part.x), y: Float64Array.from(part.y, number), count: part.count });
      const averages = curve.averages ? read(curve.averages) : null;
      return { ...read(curve), unshown: curve.unshown ?? 0, averages };
    });
  }

  // An exponential moving average, debiased. Of a long curve it is that of its parts' averages: a part of n values
  // counts as n of them.
  function smoothed(curve, weight) {
    const { x, y, count } = curve.averages ?? { x: curve.x, y: curve.y };
    const out = new Float64Array(y.length);
    let average = 0;
    let bias = 1;
    for (let index = 0; index < y.length; index++) {
      if (!Number.isFinite(y[index])) { out[index] = y[index]; continue; }
      const before = weight ** (count ? count[index] : 1);
      average = before * average + (1 - before) * y[index];
      bias *= before;
      out[index] = average / (1 - bias);
    }
    return { x, y: out };
  }

  // The last place at or before `wanted`, or the first.
  function find(x, wanted) {
    let low = 0;
    let high = x.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (x[middle] <= wanted) low = middle; else high = middle - 1;
    }
    return low;
  }

  function nearest(x, wanted) {
    const place = find(x, wanted);
    return place + 1 < x.length && x[place + 1] - wanted < wanted - x[place] ? place + 1 : place;
  }

  const isShown = (value) => Number.isFinite(value) && (!state.log || value > 0);

  // MARK: Ticks

  function linearTicks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.999) ?? power * 10;
    const ticks = [];
    for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9 && ticks.length < 50; place++) {
      ticks.push(Number((place * step).toPrecision(12)));
    }
    return ticks;
  }

  function logTicks(low, high, count) {
    const [first, last] = [Math.ceil(Math.log10(low)), Math.floor(Math.log10(high))];
    if (last - first < 1) return linearTicks(low, high, count).filter((tick) => tick > 0);
    const step = Math.max(1, Math.ceil((last - first + 1) / count));
    const ticks = [];
    for (let power = first; power <= last; power += step) ticks.push(Number(`1e${power}`));
    return ticks;
  }

  function label(value) {
    const amount = Math.abs(value);
    if (value !== 0 && (amount >= 1e6 || amount < 1e-4)) {
      return Number(value.toPrecision(4)).toExponential().replace("e+", "e");
    }
    return String(Number(value.toPrecision(6)));
  }

  // MARK: Charts

  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    return { runs: Array.from({ length: colours }, (_, index) => value(`--c${index}`)), text: value("--text"),
      soft: value("--soft"), grid: value("--grid"), line: value("--line"), accent: value("--accent") };
  };
  let paint = palette();
  const colour = (run) => paint.runs[run % colours];
  const dash = (run) => dashes[Math.floor(run / colours) % dashes.length];

  function runMark(run) {
    const dot = element("span", { class: "dot" });
    dot.style.borderColor = `var(--c${run % colours})`;
    dot.style.borderTopStyle = run < colours ? "solid" : run < 2 * colours ? "dashed" : "dotted";
    return dot;
  }

  const everyX = data.keys.flatMap((key) => key.curves).filter((curve) => curve && curve.x.length);
  const whole = everyX.reduce(
    ([low, high], curve) => [Math.min(low, curve.x[0]), Math.max(high, curve.x[curve.x.length - 1])],
    [Infinity, -Infinity]);

  class Chart {
    constructor(key) {
      this.key = key;
      this.canvas = element("canvas", { role: "img", "aria-label": `${key.name} over updates` });
      this.tip = element("div", { class: "tip", hidden: true });
      this.note = element("p", { class: "soft note" });
      this.card = element("section", { class: "chart" }, element("h3", {}, key.name), this.canvas, this.tip, this.note);
      this.isSeen = false;
      this.smoothed = new Map();
      this.listen();
    }

    lines() {
      return this.key.curves.map((curve, run) => ({ curve, run }))
        .filter(({ curve, run }) => curve && !state.hidden.has(run));
    }

    smooth(curve, run) {
      const known = this.smoothed.get(run);
      if (known?.weight === state.smooth) return known.line;
      const line = smoothed(curve, state.smooth);
      this.smoothed.set(run, { weight: state.smooth, line });
      return line;
    }

    // The values to be seen give the range.
    measure() {
      let [x0, x1] = state.zoom ?? whole;
      if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x1 + 0.5];
      let [low, high] = [Infinity, -Infinity];
      for (const { curve } of this.lines()) {
        const end = Math.min(curve.x.length - 1, find(curve.x, x1) + 1);
        for (let index = find(curve.x, x0); index <= end; index++) {
          const value = curve.y[index];
          if (!isShown(value)) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
      this.isEmpty = low > high;
      if (this.isEmpty) [low, high] = state.log ? [0.1, 1] : [0, 1];
      if (state.log) {
        if (low === high) [low, high] = [low / 2, high * 2];
        const margin = (high / low) ** 0.04;
        [low, high] = [low / margin, high * margin];
      } else {
        // Halved, since two numbers may be further apart than a number is large.
        const margin = low === high ? Math.max(Math.abs(low) * 0.1, 1e-12) : (high / 2 - low / 2) * 0.08;
        [low, high] = [Math.max(-Number.MAX_VALUE, low - margin), Math.min(Number.MAX_VALUE, high + margin)];
      }
      Object.assign(this, { x0, x1, low, high });
    }

    draw() {
      this.measure();
      this.describe();
      if (!this.isSeen) return;
      const { canvas } = this;
      const ratio = window.devicePixelRatio || 1;
      const [width, height] = [canvas.clientWidth, canvas.clientHeight];
      if (!width) return;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      const box = { left: room.left, right: width - room.right, top: room.top, bottom: height - room.bottom };
      this.box = box;
      const { x0, x1, low, high } = this;
      this.atX = (x) => box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left);
      const place = state.log ? Math.log10 : (value) => value / 2;
      const [bottom, top] = [place(low), place(high)];
      this.atY = (y) => box.bottom - ((place(y) - bottom) / (top - bottom)) * (box.bottom - box.top);
      this.drawAxes(pen);
      pen.save();
      pen.beginPath();
      pen.rect(box.left, box.top - 2, box.right - box.left, box.bottom - box.top + 4);
      pen.clip();
      for (const { curve, run } of this.lines()) {
        const isSmooth = state.smooth > 0;
        this.drawLine(pen, curve, run, isSmooth ? 0.22 : 1, 1.4);
        if (isSmooth) this.drawLine(pen, this.smooth(curve, run), run, 1, 1.8);
      }
      pen.restore();
      this.drawMarks(pen);
      if (this.selected) {
        pen.fillStyle = paint.accent;
        pen.globalAlpha = 0.18;
        const [from, to] = this.selected;
        pen.fillRect(Math.min(from, to), box.top, Math.abs(to - from), box.bottom - box.top);
        pen.globalAlpha = 1;
      }
      if (this.hover !== undefined) this.drawHover(pen);
    }

    drawAxes(pen) {
      const { box } = this;
      pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
      pen.lineWidth = 1;
      pen.textBaseline = "middle";
      pen.textAlign = "right";
      const ticks = (state.log ? logTicks : linearTicks)(this.low, this.high, 5);
      for (const tick of ticks) {
        const y = Math.round(this.atY(tick)) + 0.5;
        if (y < box.top - 1 || y > box.bottom + 1) continue;
        pen.strokeStyle = paint.grid;
        pen.beginPath(); pen.moveTo(box.left, y); pen.lineTo(box.right, y); pen.stroke();
        pen.fillStyle = paint.soft;
        pen.fillText(label(tick), box.left - 6, y);
      }
      pen.textBaseline = "top";
      pen.textAlign = "center";
      const across = linearTicks(this.x0, this.x1, Math.max(2, Math.floor((box.right - box.left) / 90)));
      for (const tick of across.filter(Number.isInteger)) {
        const x = Math.round(this.atX(tick)) + 0.5;
        pen.strokeStyle = paint.grid;
        pen.beginPath(); pen.moveTo(x, box.top); pen.lineTo(x, box.bottom); pen.stroke();
        pen.fillStyle = paint.soft;
        pen.fillText(label(tick), Math.min(x, box.right - 8), box.bottom + 18);
      }
      pen.strokeStyle = paint.line;
      pen.strokeRect(box.left + 0.5, box.top + 0.5, box.right - box.left - 1, box.bottom - box.top);
    }

    drawLine(pen, line, run, alpha, width) {
      const { x, y } = line;
      pen.strokeStyle = colour(run);
      pen.fillStyle = colour(run);
      pen.globalAlpha = alpha;
      pen.lineWidth = width;
      pen.lineJoin = "round";
      pen.setLineDash(dash(run));
      pen.beginPath();
      const end = Math.min(x.length - 1, find(x, this.x1) + 1);
      let isDown = false;
      const alone = [];
      for (let index = find(x, this.x0); index <= end; index++) {
        if (!isShown(y[index])) { isDown = false; continue; }
        const [px, py] = [this.atX(x[index]), this.atY(y[index])];
        if (isDown) pen.lineTo(px, py);
        else {
          pen.moveTo(px, py);
          // A value between two gaps is no line.
          if (index === end || !isShown(y[index + 1])) alone.push([px, py]);
        }
        isDown = true;
      }
      pen.stroke();
      pen.setLineDash([]);
      for (const [px, py] of alone) { pen.beginPath(); pen.arc(px, py, 2, 0, 2 * Math.PI); pen.fill(); }
      pen.globalAlpha = 1;
    }

    // Crosses on the axis mark values that can't be shown. Triangles below it mark checkpoints.
    drawMarks(pen) {
      const { box } = this;
      for (const { curve, run } of this.lines()) {
        pen.strokeStyle = colour(run);
        pen.lineWidth = 1.4;
        let before = -Infinity;
        for (let index = find(curve.x, this.x0); index < curve.x.length && curve.x[index] <= this.x1; index++) {
          if (isShown(curve.y[index]) || curve.x[index] < this.x0) continue;
          const x = this.atX(curve.x[index]);
          if (x - before < 8) continue;
          before = x;
          pen.beginPath();
          pen.moveTo(x - 3.5, box.bottom - 3.5); pen.lineTo(x + 3.5, box.bottom + 3.5);
          pen.moveTo(x + 3.5, box.bottom - 3.5); pen.lineTo(x - 3.5, box.bottom + 3.5);
          pen.stroke();
        }
      }
      data.runs.forEach(({ checkpoints }, run) => {
        if (state.hidden.has(run) || !this.key.curves[run]) return;
        pen.fillStyle = colour(run);
        for (const { update } of checkpoints) {
          if (update === undefined || update < this.x0 || update > this.x1) continue;
          const x = this.atX(update);
          pen.beginPath();
          pen.moveTo(x, box.bottom + 6); pen.lineTo(x - 4, box.bottom + 14); pen.lineTo(x + 4, box.bottom + 14);
          pen.fill();
        }
      });
    }

    drawHover(pen) {
      const x = this.atX(this.hover);
      const { box } = this;
      pen.strokeStyle = paint.soft;
      pen.lineWidth = 1;
      pen.setLineDash([3, 3]);
      pen.beginPath(); pen.moveTo(x, box.top); pen.lineTo(x, box.bottom); pen.stroke();
      pen.setLineDash([]);
      for (const { curve, run } of this.lines()) {
        const line = state.smooth > 0 ? this.smooth(curve, run) : curve;
        const index = nearest(line.x, this.hover);
        const [px, y] = [this.atX(line.x[index]), line.y[index]];
        if (!isShown(y) || Math.abs(px - x) > 12) continue;
        pen.fillStyle = colour(run);
        pen.beginPath(); pen.arc(px, this.atY(y), 3.2, 0, 2 * Math.PI); pen.fill();
      }
    }

    describe() {
      let unshown = 0;
      for (const { curve } of this.lines()) {
        unshown += curve.unshown;
        if (state.log) for (const value of curve.y) if (value <= 0 && Number.isFinite(value)) unshown += 1;
      }
      const why = state.log ? "NaN, infinite or not positive" : "NaN or infinite";
      const words = [];
      if (unshown) words.push(`× ${unshown} value${unshown === 1 ? "" : "s"} not shown (${why})`);
      const sampled = this.lines().filter(({ curve }) => curve.averages);
      const longest = Math.max(0, ...sampled.map(({ curve }) => curve.count));
      if (longest) words.push(`sampled from up to ${longest} values; lowest and highest stay`);
      if (this.isEmpty) words.unshift("no value to show here");
      this.note.textContent = words.join(" · ");
    }

    // MARK: Pointer

    updateAt(x) {
      return this.x0 + ((x - this.box.left) / (this.box.right - this.box.left)) * (this.x1 - this.x0);
    }

    listen() {
      const { canvas } = this;
      const within = (event) => Math.max(this.box.left, Math.min(this.box.right, event.offsetX));
      canvas.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || !this.box) return;
        canvas.setPointerCapture(event.pointerId);
        this.selected = [within(event), within(event)];
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!this.box) return;
        if (this.selected) this.selected[1] = within(event);
        this.point(within(event));
      });
      canvas.addEventListener("pointerup", (event) => {
        const selected = this.selected;
        this.selected = undefined;
        if (!selected) return;
        const [from, to] = [Math.min(...selected), Math.max(...selected)];
        if (to - from > 6) zoom([this.updateAt(from), this.updateAt(to)]);
        else this.point(within(event));
      });
      canvas.addEventListener("pointercancel", () => { this.selected = undefined; this.leave(); });
      canvas.addEventListener("pointerleave", () => { if (!this.selected) this.leave(); });
      canvas.addEventListener("dblclick", () => zoom(null));
    }

    leave() {
      this.hover = undefined;
      this.tip.hidden = true;
      this.draw();
    }

    point(x) {
      const at = this.updateAt(x);
      const found = this.lines().map(({ curve, run }) => ({ curve, run, index: nearest(curve.x, at) }));
      if (!found.length) return this.leave();
      const update = found.map(({ curve, index }) => curve.x[index])
        .reduce((best, each) => (Math.abs(each - at) < Math.abs(best - at) ? each : best));
      this.hover = update;
      // The highest first, as the lines lie.
      const rows = found.map(({ curve, run }) => {
        const index = nearest(curve.x, update);
        const line = state.smooth > 0 ? this.smooth(curve, run) : null;
        return { run, update: curve.x[index], value: curve.y[index], smooth: line?.y[nearest(line.x, update)] };
      }).filter((row) => Math.abs(this.atX(row.update) - this.atX(update)) <= 12);
      const height = ({ value }) => (Number.isNaN(value) ? -Infinity : value);
      rows.sort((first, second) => (height(first) < height(second)) - (height(first) > height(second)));
      const shown = rows.slice(0, 12).map(({ run, value, smooth }) => element("div", {}, runMark(run),
        element("span", {}, data.runs[run].name),
        element("b", {}, smooth === undefined ? short(value) : `${short(smooth)} (${short(value)})`)));
      if (rows.length > 12) shown.push(element("div", { class: "soft" }, `and ${rows.length - 12} more`));
      const near = data.runs.flatMap(({ checkpoints }, run) => state.hidden.has(run) ? [] : checkpoints
        .filter((each) => each.update !== undefined && Math.abs(this.atX(each.update) - x) <= 5)
        .map((each) => element("div", { class: "soft" }, runMark(run), element("span", {}, `▲ ${each.file}`))));
      this.tip.replaceChildren(element("div", { class: "soft" }, `update ${update}`), ...shown, ...near.slice(0, 4));
      this.tip.hidden = false;
      // Beside the line, on the side with more room, and never out of the card.
      const left = this.canvas.offsetLeft + this.atX(update);
      const [width, space] = [this.tip.offsetWidth, this.card.clientWidth];
      const wanted = left > space / 2 ? left - 12 - width : left + 12;
      this.tip.style.left = `${Math.max(4, Math.min(wanted, space - width - 4))}px`;
      this.tip.style.top = `${this.canvas.offsetTop + 12}px`;
      this.draw();
    }
  }

  const charts = data.keys.map((key) => new Chart(key));
  const redraw = () => charts.forEach((chart) => chart.draw());
  let reset;

  function zoom(range) {
    state.zoom = range;
    reset.disabled = !range;
    for (const chart of charts) chart.leave();
  }

  // MARK: Tables

  function table(columns, rows) {
    const body = element("tbody");
    const made = (cell, index) => element("td", {
      class: `${columns[index].right ? "right" : ""} ${cell.colour ?? ""}`.trim(), title: cell.text,
    }, cell.text);
    const fill = (rows) => body.replaceChildren(...rows.map((cells) => element("tr", {}, ...cells.map(made))));
    const isNumber = (text) => text.trim() !== "" && Number.isFinite(Number(text));
    const rank = (cell) => cell.rank ?? (isNumber(cell.text) ? Number(cell.text) : cell.text);
    let order = null;
    const heads = columns.map((column, index) => {
      const sort = () => {
        const isDown = order?.index === index && !order.isDown;
        order = { index, isDown };
        heads.forEach((head, place) => {
          if (place === index) head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
          else head.removeAttribute("aria-sort");
        });
        const missing = (cell) => cell.text === "-";
        fill([...rows].sort((first, second) => {
          const [one, other] = [first[index], second[index]];
          if (missing(one) || missing(other)) return missing(one) - missing(other);
          const [a, b] = [rank(one), rank(other)];
          if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
          const before = a < b ? -1 : a > b ? 1 : 0;
          return isDown ? -before : before;
        }));
      };
      const button = element("button", { type: "button", onclick: sort }, column.title);
      return element("th", { scope: "col", class: column.right ? "right" : "" }, button);
    });
    fill(rows);
    const head = element("thead", {}, element("tr", {}, ...heads));
    return element("div", { class: "scroll", tabindex: "0" }, element("table", {}, head, body));
  }

  function checkpointTable() {
    const columns = [{ title: "RUN" }, { title: "FILE" }, { title: "UPDATE", right: true },
      { title: "SIZE", right: true }, { title: "WRITTEN" }];
    const rows = data.runs.flatMap((run) => run.checkpoints.map((each) => [
      { text: run.name }, { text: each.file }, { text: String(each.update ?? "-") },
      { text: size(each.bytes), rank: each.bytes }, { text: time(each.at), rank: each.at },
    ]));
    return rows.length ? table(columns, rows) : null;
  }

  // MARK: The page

  const chips = data.runs.map((run, index) => element("button", {
    type: "button", class: "run", "aria-pressed": "true", title: run.directory,
    onclick: () => show([index], state.hidden.has(index)),
  }, runMark(index), element("span", {}, run.name)));

  function show(runs, isWanted) {
    for (const run of runs) {
      if (isWanted) state.hidden.delete(run); else state.hidden.add(run);
      chips[run].setAttribute("aria-pressed", String(isWanted));
    }
    redraw();
  }

  function controls() {
    const weight = element("output", {}, "0");
    const smooth = element("input", { type: "range", min: "0", max: "0.99", step: "0.01", value: "0", id: "smooth" });
    smooth.addEventListener("input", () => {
      state.smooth = Number(smooth.value);
      weight.textContent = smooth.value;
      redraw();
    });
    const log = element("input", { type: "checkbox", id: "log" });
    log.addEventListener("change", () => { state.log = log.checked; redraw(); });
    const button = (id, words, onclick) => element("button", { type: "button", id, onclick }, words);
    reset = button("reset", "Whole range", () => zoom(null));
    reset.disabled = true;
    const parts = [element("label", {}, "Smoothing ", smooth, weight), element("label", {}, log, "Log scale"), reset];
    if (charts.length > 4) {
      const words = "Find keys";
      const search = element("input", { type: "search", id: "keys", placeholder: words, "aria-label": words });
      search.addEventListener("input", () => {
        const wanted = search.value.toLowerCase();
        for (const chart of charts) chart.card.hidden = !chart.key.name.toLowerCase().includes(wanted);
      });
      parts.push(search);
    }
    const all = data.runs.map((_, index) => index);
    if (all.length > 2) {
      parts.push(button("all", "All runs", () => show(all, true)), button("none", "No runs", () => show(all, false)));
    }
    return element("div", { class: "bar" }, ...parts, element("div", { class: "runs" }, ...chips));
  }

  const body = document.body;
  const count = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"}`;
  body.append(element("h1", {}, data.title),
    element("p", { class: "soft" }, `${count} · ${time(data.made_at)} · noether-writer ${data.version}`));
  for (const problem of data.problems) body.append(element("p", { class: "red problem" }, problem));
  for (const note of data.notes) body.append(element("p", { class: "soft" }, note));
  body.append(element("h2", {}, "Runs"), table(data.summary.columns, data.summary.rows));
  if (charts.length) {
    body.append(element("h2", {}, "Curves"), element("p", { class: "soft" },
      "Drag over a chart to zoom, double-click for the whole range. × value that is not shown, ▲ checkpoint."),
    controls(), element("div", { class: "charts" }, ...charts.map((chart) => chart.card)));
  }
  const checkpoints = checkpointTable();
  if (checkpoints) body.append(element("h2", {}, "Checkpoints"), checkpoints);

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = charts.find((each) => each.card === entry.target);
      chart.isSeen = entry.isIntersecting;
      if (chart.isSeen) chart.draw();
    }
  }, { rootMargin: "200px" });
  for (const chart of charts) seen.observe(chart.card);
  redraw();
  let width = body.clientWidth;
  new ResizeObserver(() => {
    if (body.clientWidth === width) return;
    width = body.clientWidth;
    redraw();
  }).observe(body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint = palette(); redraw(); });
})();
