/* The page of a folder: narrowed to a name. */
"use strict";
(function () {
  const plain = (text) => text.normalize("NFKC").toLowerCase();
  const rows = [...document.querySelectorAll("#videos tbody tr")].map((row) => [plain(row.cells[0].textContent), row]);
  const search = document.getElementById("search"), found = document.getElementById("found");

  function narrow() {
    const wanted = plain(search.value).trim();
    let count = 0;
    for (const [name, row] of rows) {
      row.hidden = !name.includes(wanted);
      count += !row.hidden;
    }
    found.textContent = wanted ? count + " of " + rows.length : "";
    document.getElementById("nothing").hidden = count > 0 || !wanted;
  }

  search.addEventListener("input", narrow);
  narrow();
})();
