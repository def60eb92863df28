/* Valence and arousal over time: two panels with one clock, drawn of as many points as there are pixels. */
"use strict";
window.vacli = window.vacli || {};
(function (vacli) {
  const LEAST_SPAN_S = 0.25;
  const STEPS_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400];

  vacli.unpack = function (packed, Type) {
    const raw = atob(packed);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Type(bytes.buffer);
  };

  /* The last row at or before time_s (never before the first): what is on the screen then. */
  vacli.rowAt = function (times, time_s) {
    let low = 0, high = times.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (times[middle] <= time_s) low = middle; else high = middle - 1;
    }
    return low;
  };

  vacli.nearestRow = function (times, time_s) {
    const row = vacli.rowAt(times, time_s);
    return row + 1 < times.length && times[row + 1] - time_s < time_s - times[row] ? row + 1 : row;
  };

  vacli.clock = function (time_s, digits) {
    const unit = 10 ** digits, ticks = Math.round(Math.max(0, time_s) * unit);
    const whole = Math.floor(ticks / unit), hours = Math.floor(whole / 3600);
    const two = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(whole / 60) % 60;
    const rest = digits ? "." + String(ticks % unit).padStart(digits, "0") : "";
    return (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(whole % 60) + rest;
  };

  vacli.signed = (value, digits) =>
    Number.isNaN(value) ? "none" : value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "\u2212");

  /* Rows first..last of the columns, or where they are many the least and the greatest of each bucket, as they come.
     Buckets begin at multiples of a power of two, so that nothing flickers while the view moves.
     A column is {values, pick}: "both", or "least" and "greatest" for the edges of a band. NaN is drawn as a gap. */
  vacli.thinned = function (times, columns, first, last, buckets) {
    const size = 2 ** Math.max(0, Math.ceil(Math.log2((last - first) / (2 * buckets)))) * 2;
    if (last - first <= 2 * buckets) {
      const whole = (values) => Array.from(values.subarray(first, last), (v) => (Number.isNaN(v) ? null : v));
      return [Array.from(times.subarray(first, last)), ...columns.map((c) => whole(c.values))];
    }
    const start = Math.floor(first / size) * size, half = size >> 1, xs = [];
    for (let low = start; low < last; low += size) {
      xs.push(times[low], times[Math.min(low + half, times.length - 1)]);
    }
    return [xs, ...columns.map((column) => extremes(column, start, last, size))];
  };

  function extremes({ values, pick }, start, last, size) {
    const out = [];
    for (let low = start; low < last; low += size) {
      const high = Math.min(low + size, values.length);
      let least = Infinity, greatest = -Infinity, least_at = 0, greatest_at = 0;
      for (let i = low; i < high; i++) {
        const v = values[i];
        if (v < least) { least = v; least_at = i; }
        if (v > greatest) { greatest = v; greatest_at = i; }
      }
      if (least === Infinity) out.push(null, null);
      else if (pick === "least") out.push(least, least);
      else if (pick === "greatest") out.push(greatest, greatest);
      else if (least_at < greatest_at) out.push(least, greatest);
      else out.push(greatest, least);
    }
    return out;
  }

  /* holders: {valence, arousal}, the elements to draw into. person: {times, gaps, valence, arousal}, the latter two
     {values, spread or null, labels or null}. on: {seek(time_s), hover(time_s or null, event)}. */
  vacli.Curves = class {
    constructor(holders, person, on) {
      Object.assign(this, { holders, person, on });
      const times = person.times;
      this.whole = { min: times[0], max: Math.max(times[times.length - 1], times[0] + LEAST_SPAN_S) };
      this.view = { ...this.whole };
      this.now_s = this.view.min;
      this.drawn_ms = 0;
      this.gaps_drawn = [];
      this.panels = ["valence", "arousal"].map((name, i) => this.panel(name, i === 1));
      this.draw();
    }

    panel(name, is_last) {
      const { values, spread, labels } = this.person[name];
      const colour = look(name);
      const columns = [{ values, pick: "both" }];
      const series = [{}, { stroke: colour, width: 1.6, points: { show: values.length === 1, size: 7 } }];
      if (spread) {
        const edge = (sign) => values.map((v, i) => Math.max(-1, Math.min(1, v + sign * spread[i])));
        columns.push({ values: edge(1), pick: "greatest" }, { values: edge(-1), pick: "least" });
        series.push(...[0, 0].map(() => ({ stroke: null, width: 0, points: { show: false } })));
      }
      if (labels) {
        columns.push({ values: labels, pick: "both" });
        series.push({ stroke: look("ink"), width: 1.2, dash: [5, 3], points: { show: false } });
      }
      const holder = this.holders[name];
      const options = {
        width: holder.clientWidth, height: holder.clientHeight, padding: [6, 4, is_last ? 0 : 6, 0], series,
        bands: spread ? [{ series: [2, 3], fill: colour + "33" }] : [],
        legend: { show: false },
        cursor: { y: false, points: { show: false }, drag: { x: false, y: false, setScale: false }, sync: { key: "vacli" } },
        scales: { x: { time: false, range: () => [this.view.min, this.view.max] }, y: { range: [-1, 1] } },
        axes: axes(is_last),
        hooks: { drawClear: [(u) => this.shade(u)] },
      };
      const plot = new uPlot(options, [[], ...columns.map(() => [])], holder);
      const playhead = plot.over.appendChild(document.createElement("div"));
      playhead.className = "playhead";
      listen(this, plot);
      return { plot, columns, playhead };
    }

    draw() {
      const began = performance.now(), { times } = this.person, { min, max } = this.view;
      const first = Math.max(0, vacli.rowAt(times, min) - 1), last = Math.min(times.length, vacli.rowAt(times, max) + 3);
      for (const { plot, columns } of this.panels) {
        const data = vacli.thinned(times, columns, first, last, Math.max(50, plot.over.clientWidth));
        plot.series[1].width = last - first > 8 * data[0].length ? 1 : 1.6; // else a long video is one solid block
        plot.batch(() => { plot.setData(data, false); plot.setScale("x", { min, max }); });
      }
      this.drawn_ms = performance.now() - began;
      this.point(this.now_s);
    }

    /* Move the playhead; nothing is drawn anew unless it leaves a view it was in. */
    point(time_s, is_wanted) {
      const was_seen = this.now_s >= this.view.min && this.now_s <= this.view.max;
      this.now_s = time_s;
      const is_seen = time_s >= this.view.min && time_s <= this.view.max;
      if (!is_seen && (was_seen || is_wanted) && this.is_zoomed()) {
        const span = this.view.max - this.view.min;
        this.show(time_s - span * 0.1, time_s + span * 0.9);
        return;
      }
      for (const { plot, playhead } of this.panels) {
        playhead.hidden = !is_seen;
        playhead.style.transform = "translateX(" + plot.valToPos(time_s, "x") + "px)";
      }
    }

    is_zoomed() { return this.view.max - this.view.min < this.whole.max - this.whole.min; }

    show(min, max) {
      const most = this.whole.max - this.whole.min;
      const span = Math.min(most, Math.max(Math.min(LEAST_SPAN_S, most), max - min));
      min = Math.min(Math.max(this.whole.min, (min + max - span) / 2), this.whole.max - span);
      this.view = { min, max: min + span };
      this.draw();
    }

    zoom(factor, around_s) {
      const { min, max } = this.view;
      if (around_s === undefined) around_s = this.now_s >= min && this.now_s <= max ? this.now_s : (min + max) / 2;
      this.show(around_s - (around_s - min) / factor, around_s + (max - around_s) / factor);
    }

    reset() { this.show(this.whole.min, this.whole.max); }

    resize() {
      for (const name of ["valence", "arousal"]) {
        const holder = this.holders[name];
        this.panels[name === "valence" ? 0 : 1].plot.setSize({ width: holder.clientWidth, height: holder.clientHeight });
      }
      this.draw();
    }

    destroy() { for (const { plot } of this.panels) plot.destroy(); }

    /* Stretches without a face, and the line of zero, beneath the curves. */
    shade(u) {
      const { ctx } = u, { left, top, width, height } = u.bbox, { times, gaps } = this.person;
      const place = (t) => Math.min(left + width, Math.max(left, u.valToPos(t, "x", true)));
      this.gaps_drawn = [];
      ctx.save();
      for (const [from, to] of gaps) {
        const begin_s = times[from], end_s = to < times.length ? times[to] : times[times.length - 1];
        if (end_s < this.view.min || begin_s > this.view.max) continue;
        const x = Math.floor(place(begin_s)), end = Math.max(x + 1, Math.ceil(place(end_s)));
        const before = this.gaps_drawn[this.gaps_drawn.length - 1];
        if (before && before[1] >= x) before[1] = Math.max(before[1], end); else this.gaps_drawn.push([x, end]);
      }
      ctx.beginPath();
      for (const [x, end] of this.gaps_drawn) ctx.rect(x, top, end - x, height);
      ctx.fillStyle = look("gap");
      ctx.fill();
      ctx.clip();
      ctx.beginPath();
      const step = 8 * devicePixelRatio;
      for (const [x, end] of this.gaps_drawn) {
        for (let at = Math.floor((x - height) / step) * step; at < end; at += step) {
          ctx.moveTo(at, top + height);
          ctx.lineTo(at + height, top);
        }
      }
      ctx.strokeStyle = look("gap-stripe");
      ctx.lineWidth = devicePixelRatio;
      ctx.stroke();
      ctx.restore();
      const zero = Math.round(u.valToPos(0, "y", true)) + 0.5;
      ctx.strokeStyle = look("edge");
      ctx.lineWidth = 1;
      ctx.beginPath();
      ctx.moveTo(left, zero);
      ctx.lineTo(left + width, zero);
      ctx.stroke();
    }
  };

  function look(name) { return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(); }

  function axes(is_last) {
    const grid = { stroke: look("line"), width: 1 }, font = "12px system-ui, sans-serif", stroke = look("soft");
    const x = {
      incrs: STEPS_S, space: 70, grid, ticks: { show: false }, font, stroke, size: is_last ? 26 : 0, gap: 6,
      values: (u, splits, a, b, step) => splits.map((s) => is_last ? vacli.clock(s, step < 0.1 ? 2 : step < 1 ? 1 : 0) : ""),
    };
    const y = {
      splits: () => [-1, -0.5, 0, 0.5, 1], grid, ticks: { show: false }, font, stroke, size: 40, gap: 6,
      values: (u, splits) => splits.map((s) => vacli.signed(s, s % 1 ? 1 : 0)),
    };
    return [x, y];
  }

  /* Click and drag seek; Shift and drag, two fingers, or Ctrl and the wheel zoom; a sideways wheel moves along. */
  function listen(curves, plot) {
    const over = plot.over, fingers = new Map();
    let chosen = null, from_x = 0;
    const x_of = (event) => event.clientX - over.getBoundingClientRect().left;
    const time_of = (x) => Math.min(curves.view.max, Math.max(curves.view.min, plot.posToVal(x, "x")));

    over.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      over.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, x_of(event));
      if (event.shiftKey) {
        from_x = x_of(event);
        chosen = over.appendChild(document.createElement("div"));
        chosen.className = "chosen";
      } else if (fingers.size === 1) curves.on.seek(time_of(x_of(event)));
    });
    over.addEventListener("pointermove", (event) => {
      const x = x_of(event);
      if (event.pointerType !== "touch") curves.on.hover(time_of(x), event);
      if (!fingers.has(event.pointerId)) return;
      if (chosen) {
        chosen.style.left = Math.min(x, from_x) + "px";
        chosen.style.width = Math.abs(x - from_x) + "px";
      } else if (fingers.size === 2) {
        const apart = () => { const [a, b] = [...fingers.values()]; return Math.max(20, Math.abs(a - b)); };
        const before = apart();
        fingers.set(event.pointerId, x);
        const [a, b] = [...fingers.values()];
        curves.zoom(apart() / before, time_of((a + b) / 2));
      } else {
        fingers.set(event.pointerId, x);
        curves.on.seek(time_of(x));
      }
    });
    const lift = (event) => {
      fingers.delete(event.pointerId);
      if (!chosen) return;
      chosen.remove();
      chosen = null;
      const [a, b] = [from_x, x_of(event)].sort((p, q) => p - q);
      if (b - a > 4) curves.show(time_of(a), time_of(b));
    };
    over.addEventListener("pointerup", lift);
    over.addEventListener("pointercancel", lift);
    over.addEventListener("pointerleave", (event) => curves.on.hover(null, event));
    over.addEventListener("dblclick", () => curves.reset());
    over.addEventListener("wheel", (event) => {
      const sideways = event.shiftKey && !event.deltaX ? event.deltaY : event.deltaX;
      if (event.ctrlKey || event.metaKey) {
        curves.zoom(Math.exp(-event.deltaY * (Math.abs(event.deltaY) < 50 ? 0.01 : 0.003)), time_of(x_of(event)));
      } else if (curves.is_zoomed() && Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
        const by_s = (sideways / over.clientWidth) * (curves.view.max - curves.view.min);
        curves.show(curves.view.min + by_s, curves.view.max + by_s);
      } else return;
      event.preventDefault();
    }, { passive: false });
  }
})(window.vacli);
