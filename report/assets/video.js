/* The page of one video: picture and curves follow each other. */
"use strict";
(function (vacli) {
  const TAIL_S = 3, TAIL_POINTS = 90, TAIL_PIECES = 5, CELLS = 20, NUDGE_S = 0.01;
  const INTO_S = 0.001; // into the frame: browser and curve round to microseconds, so its very start may show the one before
  const SVG = "http://www.w3.org/2000/svg";
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const video = $("video"), slider = $("time"), tip = $("tip");
  const clocks = data.clocks.map((packed) => vacli.unpack(packed, Float64Array));
  let person, curves, now_s = 0, row = 0, wanted_s = null;
  let is_playable = Boolean(video);

  function unpacked(found) {
    const floats = (packed) => (packed ? vacli.unpack(packed, Float32Array) : null);
    const axis = (one) => ({ values: floats(one.values), spread: floats(one.spread), labels: floats(one.labels), ccc: one.ccc });
    return { times: clocks[found.clock], gaps: found.gaps, valence: axis(found.valence), arousal: axis(found.arousal) };
  }

  // ---- one person ------------------------------------------------------------------------------------------

  function choose(index) {
    person = unpacked(data.people[index]);
    if (curves) curves.destroy();
    curves = new vacli.Curves(
      { valence: $("valence").querySelector(".plot"), arousal: $("arousal").querySelector(".plot") }, person, { seek, hover });
    const { times, valence, gaps } = person;
    slider.min = times[0];
    slider.max = curves.whole.max;
    $("end").textContent = vacli.clock(times[times.length - 1], 0);
    $("legend-label").hidden = $("plane-truth").hidden = !valence.labels;
    $("legend-spread").hidden = !valence.spread;
    $("legend-gap").hidden = !gaps.length;
    for (const name of ["valence", "arousal"]) {
      const { ccc } = person[name];
      part(name, "ccc").textContent = ccc === null ? "" : "CCC " + vacli.signed(ccc, 3);
    }
    for (const facts of document.querySelectorAll("[data-person]")) facts.hidden = facts.dataset.person !== String(index);
    draw_density();
    show(now_s);
    say_time();
  }

  const part = (name, what) => $(name).querySelector("." + what);
  const is_unseen = (at) => {
    const { gaps } = person;
    let low = 0, high = gaps.length;
    while (low < high) { const middle = (low + high) >> 1; if (gaps[middle][1] <= at) low = middle + 1; else high = middle; }
    return low < gaps.length && gaps[low][0] <= at;
  };

  // ---- where we are ----------------------------------------------------------------------------------------

  function show(time_s, is_wanted) {
    const { times } = person;
    now_s = Math.min(Math.max(time_s, times[0]), curves.whole.max);
    row = vacli.rowAt(times, now_s + 5e-4);
    curves.point(now_s, is_wanted);
    $("now").textContent = vacli.clock(now_s, 2);
    $("frame").textContent = String(row + 1);
    $("unseen").hidden = !is_unseen(row);
    slider.value = now_s;
    for (const name of ["valence", "arousal"]) {
      const { values, spread, labels } = person[name];
      part(name, "value").textContent = vacli.signed(values[row], 3);
      part(name, "spread").textContent = spread ? "\u00b1 " + spread[row].toFixed(3) : "";
      part(name, "label").textContent = labels ? "label " + vacli.signed(labels[row], 3) : "";
    }
    draw_dot();
  }

  function seek(time_s) {
    show(time_s, true);
    say_time();
    if (!is_playable) return;
    if (video.seeking) wanted_s = now_s; // one after the other: a drag asks faster than a video can jump
    else video.currentTime = now_s + INTO_S;
  }

  const seek_row = (to) => {
    const { times } = person, at = Math.min(Math.max(to, 0), times.length - 1);
    const next_s = at + 1 < times.length ? times[at + 1] : times[at] + 2 * NUDGE_S;
    seek(times[at] + Math.min(NUDGE_S, (next_s - times[at]) / 2)); // within the frame, not on its edge
  };

  /* Said to who cannot see it, and only when the video stands still. */
  function say_time() {
    const { valence, arousal } = person;
    slider.setAttribute("aria-valuetext", vacli.clock(now_s, 2) + ", valence " + vacli.signed(valence.values[row], 2) +
      ", arousal " + vacli.signed(arousal.values[row], 2) + (is_unseen(row) ? ", no face" : ""));
  }

  function hover(time_s, event) {
    tip.hidden = time_s === null;
    if (tip.hidden) return;
    const at = vacli.nearestRow(person.times, time_s);
    const line = (title, { values, spread, labels }) => title + " " + vacli.signed(values[at], 3) +
      (spread ? " \u00b1 " + spread[at].toFixed(3) : "") + (labels ? "  label " + vacli.signed(labels[at], 3) : "");
    tip.textContent = vacli.clock(person.times[at], 2) + "  frame " + (at + 1) + (is_unseen(at) ? ", no face" : "") + "\n" +
      line("Valence", person.valence) + "\n" + line("Arousal", person.arousal);
    const box = tip.offsetParent.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const left = x + 16 + tip.offsetWidth < box.width ? x + 16 : Math.max(0, x - 16 - tip.offsetWidth);
    tip.style.transform = "translate(" + left + "px," + Math.max(0, y - tip.offsetHeight - 12) + "px)";
  }

  // ---- the plane -------------------------------------------------------------------------------------------

  const made = (tag, into, attributes) => {
    const element = into.appendChild(document.createElementNS(SVG, tag));
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const place = (v, a) => (100 * v).toFixed(1) + "," + (-100 * a).toFixed(1);
  const pieces = Array.from({ length: TAIL_PIECES }, (_, i) =>
    made("polyline", $("tail"), { opacity: ((i + 1) / TAIL_PIECES) * 0.75 }));

  function draw_density() {
    const counts = new Map(), cell = 200 / CELLS;
    const index = (v) => Math.min(CELLS - 1, Math.max(0, Math.floor(((v + 1) * CELLS) / 2)));
    for (let i = 0; i < person.times.length; i++) {
      if (Number.isNaN(person.valence.values[i])) continue;
      const key = index(person.valence.values[i]) * CELLS + index(-person.arousal.values[i]);
      counts.set(key, (counts.get(key) || 0) + 1);
    }
    const most = Math.max(...counts.values(), 1), side = cell - 1.5;
    $("density").replaceChildren();
    for (const [key, count] of counts) {
      made("rect", $("density"), {
        x: Math.floor(key / CELLS) * cell - 100 + 0.75, y: (key % CELLS) * cell - 100 + 0.75, width: side, height: side, rx: 1.5,
        opacity: (0.05 + 0.35 * Math.sqrt(count / most)).toFixed(3),
      });
    }
  }

  function draw_dot() {
    const { times } = person, v = person.valence, a = person.arousal, first = vacli.rowAt(times, now_s - TAIL_S);
    const stride = Math.max(1, Math.ceil((row - first) / TAIL_POINTS)), points = [];
    for (let i = row; i >= first; i -= stride) {
      if (!Number.isNaN(v.values[i])) points.unshift(place(v.values[i], a.values[i]));
    }
    pieces.forEach((piece, i) => {
      const from = Math.floor((i * points.length) / TAIL_PIECES), to = Math.floor(((i + 1) * points.length) / TAIL_PIECES);
      piece.setAttribute("points", points.slice(from, to + 1).join(" "));
    });
    put($("dot"), v.values[row], a.values[row]);
    $("dot").classList.toggle("unseen", is_unseen(row));
    put($("truth"), v.labels ? v.labels[row] : NaN, a.labels ? a.labels[row] : NaN);
  }

  function put(dot, v, a) {
    dot.setAttribute("visibility", Number.isNaN(v) ? "hidden" : "visible");
    if (!Number.isNaN(v)) dot.setAttribute("transform", "translate(" + place(v, a) + ")");
  }

  // ---- the video -------------------------------------------------------------------------------------------

  const is_there = () => !video.seeking && wanted_s === null; // and not between two jumps

  function follow() {
    const has_frames = "requestVideoFrameCallback" in HTMLVideoElement.prototype;
    const each = (_, frame) => {
      if (is_there() && !video.paused) show(frame.mediaTime);
      video.requestVideoFrameCallback(each);
    };
    if (has_frames) video.requestVideoFrameCallback(each);
    const tick = () => { if (!video.paused) { show(video.currentTime); requestAnimationFrame(tick); } };
    video.addEventListener("timeupdate", () => { if (is_there() && video.paused) show(video.currentTime); });
    video.addEventListener("seeking", () => { if (wanted_s === null) show(video.currentTime); });
    video.addEventListener("seeked", () => {
      if (wanted_s === null) return;
      video.currentTime = wanted_s + INTO_S;
      wanted_s = null;
    });
    video.addEventListener("play", () => { say_play(); if (!has_frames) tick(); });
    video.addEventListener("pause", () => { say_play(); show(video.currentTime); say_time(); });
    video.addEventListener("error", lost);
    if (video.error) lost();
    $("play").addEventListener("click", toggle);
  }

  function say_play() {
    $("play").textContent = video.paused ? "Play" : "Pause";
  }

  function lost() {
    is_playable = false;
    video.hidden = true;
    $("play").disabled = true;
    $("no-video").hidden = false;
    if (!$("no-video").textContent) {
      $("no-video").textContent = "The video cannot be played here: it has been moved, or this browser does not know its format. " +
        "The curves work without it.";
    }
  }

  function toggle() {
    if (!is_playable) return;
    if (!video.paused) video.pause();
    else video.play().catch((why) => { if (why.name === "NotSupportedError") lost(); });
  }

  // ---- hands -----------------------------------------------------------------------------------------------

  const KEYS = {
    " ": toggle,
    ArrowLeft: (event) => (event.shiftKey ? seek(now_s - 1) : seek_row(row - 1)),
    ArrowRight: (event) => (event.shiftKey ? seek(now_s + 1) : seek_row(row + 1)),
    Home: () => seek_row(0),
    End: () => seek_row(person.times.length - 1),
    "+": () => curves.zoom(2),
    "=": () => curves.zoom(2),
    "-": () => curves.zoom(0.5),
    "0": () => curves.reset(),
  };
  const SLIDER_KEYS = {
    ArrowDown: KEYS.ArrowLeft, ArrowUp: KEYS.ArrowRight, PageDown: () => seek(now_s - 10), PageUp: () => seek(now_s + 10),
  };

  function on_key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = event.target;
    if (at.matches("input[type=radio]") || (event.key === " " && at.matches("button, summary, a"))) return;
    const action = KEYS[event.key] || (at === slider && SLIDER_KEYS[event.key]);
    if (!action) return;
    event.preventDefault(); // before the video's own controls see it
    event.stopPropagation();
    action(event);
  }

  document.addEventListener("keydown", on_key, true);
  document.addEventListener("keyup", (event) => {
    if (event.key === " " && (event.target === video || event.target === slider)) event.preventDefault();
  }, true);
  slider.addEventListener("input", () => seek(Number(slider.value)));
  $("in").addEventListener("click", () => curves.zoom(2));
  $("out").addEventListener("click", () => curves.zoom(0.5));
  $("whole").addEventListener("click", () => curves.reset());
  for (const radio of document.querySelectorAll("input[name=person]")) {
    radio.addEventListener("change", () => choose(Number(radio.value)));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => choose_again());
  let width = 0;
  new ResizeObserver(() => {
    const holder = $("valence").querySelector(".plot");
    if (holder.clientWidth !== width) { width = holder.clientWidth; curves.resize(); }
  }).observe($("curves"));

  function chosen() {
    const radio = document.querySelector("input[name=person]:checked");
    return radio ? Number(radio.value) : 0;
  }
  function choose_again() {
    const view = curves.view;
    choose(chosen());
    curves.show(view.min, view.max);
  }

  const asked = /^#person-(\d+)$/.exec(location.hash);
  const radio = asked && document.querySelector('input[name=person][value="' + asked[1] + '"]');
  if (radio) radio.checked = true;
  choose(chosen());
  now_s = person.times[0];
  if (video) follow();
  else $("play").disabled = true;
  vacli.page = { get curves() { return curves; }, get now_s() { return now_s; }, get row() { return row; }, seek };
})(window.vacli);
