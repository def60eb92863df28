/* The page of a folder: sorted by a column, narrowed to a name. */
"use strict";
(function () {
  const body = document.querySelector("#videos tbody"), rows = [...body.rows];
  const search = document.getElementById("search"), found = document.getElementById("found");
  const heads = [...document.querySelectorAll("#videos thead th")];
  const names = rows.map((row) => row.cells[0].textContent.normalize("NFKC").toLowerCase());
  const keys = new Map(rows.map((row) => [row, [...row.cells].map((cell) => cell.dataset.key)]));

  /* Rows without a value come last, whichever way. */
  function sort(head) {
    const column = heads.indexOf(head), is_down = head.getAttribute("aria-sort") === "ascending", way = is_down ? -1 : 1;
    rows.sort((p, q) => {
      const a = keys.get(p)[column], b = keys.get(q)[column];
      return a === "" || b === "" ? (a === "") - (b === "") : way * (Number(a) - Number(b));
    });
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", is_down ? "descending" : "ascending");
    body.append(...rows);
  }

  const name_of = new Map(rows.map((row, i) => [row, names[i]]));
  function narrow() {
    const wanted = search.value.normalize("NFKC").toLowerCase().trim();
    let count = 0;
    for (const row of rows) {
      row.hidden = !name_of.get(row).includes(wanted);
      count += !row.hidden;
    }
    found.textContent = wanted ? count + " of " + rows.length : "";
    document.getElementById("nothing").hidden = count > 0 || !wanted;
  }

  for (const head of heads) head.querySelector("button")?.addEventListener("click", () => sort(head));
  search.addEventListener("input", narrow);
  narrow();
})();
