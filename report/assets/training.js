/* The page of training runs: charts that are drawn when they come into sight. */
"use strict";
(function () {
  const runs = JSON.parse(document.getElementById("data").textContent).runs;
  const look = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const KINDS = {
    loss: [["loss", "third", 2], ["alone", "soft", 2, [5, 3]]],
    ccc: [["valence", "valence", 1.6], ["arousal", "arousal", 1.6, [5, 3]], ["mean", "ink", 2.6]],
  };

  function chart(holder) {
    const run = runs[holder.dataset.run], kind = holder.dataset.kind, lines = KINDS[kind].filter(([key]) => run[key]);
    const axis = { stroke: () => look("soft"), font: "12px system-ui, sans-serif", ticks: { show: false }, gap: 6 };
    const whole = (u, splits) => splits.map((s) => (Number.isInteger(s) ? s : ""));
    const keys = new Map(lines.map(([key]) => [key, holder.parentNode.querySelector("[data-series=" + key + "] .value")]));
    const tell = (u) => {
      const at = u.cursor.idx ?? run.epoch.length - 1;
      for (const [key, place] of keys) place.textContent = run[key][at] === null ? "" : run[key][at].toFixed(4);
    };
    const best = (u) => {
      if (run.best === null) return;
      const x = Math.round(u.valToPos(run.best, "x", true)) + 0.5, { ctx } = u, { top, height } = u.bbox;
      ctx.save();
      ctx.strokeStyle = look("edge");
      ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, top);
      ctx.lineTo(x, top + height);
      ctx.stroke();
      ctx.restore();
    };
    const series = lines.map(([, colour, width, dash]) => (
      { stroke: () => look(colour), width, dash, points: { show: run.epoch.length < 30, size: 5, fill: () => look(colour) } }
    ));
    const last = run.epoch.length;
    const plot = new uPlot({
      width: holder.clientWidth, height: holder.clientHeight, padding: [8, 8, 0, 0], legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false, setScale: false }, sync: { key: "run-" + holder.dataset.run } },
      scales: { x: { time: false, range: [Math.min(1, last - 0.5), Math.max(last, 1.5)] }, y: { range: (u, low, high) => span(kind, low, high) } },
      axes: [{ ...axis, grid: { show: false }, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000], space: 34, size: 26, values: whole },
        { ...axis, grid: { stroke: () => look("line"), width: 1 }, size: 48 }],
      series: [{}, ...series], hooks: { setCursor: [tell], drawClear: [best] },
    }, [run.epoch, ...lines.map(([key]) => run[key])], holder);
    tell(plot);
    new ResizeObserver(() => plot.setSize({ width: holder.clientWidth, height: holder.clientHeight })).observe(holder);
    dark.addEventListener("change", () => plot.redraw());
  }

  /* CCC from 0 to 1, or as far below 0 as it goes; a loss with some air about it. */
  function span(kind, low, high) {
    if (low === null || high === null) return [0, 1];
    if (kind === "ccc") return [Math.min(0, Math.floor(low * 10) / 10), 1];
    const air = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 ? Math.max(0, low - air) : low - air, high + air];
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      seen.unobserve(entry.target);
      chart(entry.target);
    }
  }, { rootMargin: "400px" });
  for (const holder of document.querySelectorAll(".chart")) seen.observe(holder);
})();
