/* Tables that sort by a column, whose header is a button: by data-key, else by the text. */
"use strict";
(function () {
  const order = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  /* Numbers from the largest first; rows without a value come last, whichever way. */
  function sort(table, head) {
    const column = head.cellIndex, is_number = head.classList.contains("number");
    const now = head.getAttribute("aria-sort"), is_down = now ? now === "ascending" : is_number;
    const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
    const compare = (a, b) => (is_down ? -1 : 1) * (is_number ? Number(a) - Number(b) : order.compare(a, b));
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : compare(a, b)));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", is_down ? "descending" : "ascending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const head of table.tHead.rows[0].cells) head.querySelector("button")?.addEventListener("click", () => sort(table, head));
  }
})();
