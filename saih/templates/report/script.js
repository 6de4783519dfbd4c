// Sorts and filters the tables, shows a figure's values under the pointer. The page says everything without it.
(() => {
  "use strict"
  const SHOWN = 100 // rows of a table at first
  const POWERS = { n: -9, "µ": -6, m: -3, k: 3, M: 6, G: 9, T: 12, P: 15, E: 18 }

  // "62.5 ms" -> 0.0625; null where the text does not begin with a number
  const valueOf = text => {
    const found = /^([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s*(?:([nµmkMGTPE])(?![a-z]{2,}|$)|([kMGTPE])$)?/u.exec(text)
    return found && Number(found[1].replaceAll(",", "")) * 10 ** (POWERS[found[2] ?? found[3]] ?? 0)
  }

  const compare = (a, b) => {
    const [x, y] = [valueOf(a), valueOf(b)]
    if (x === null || y === null) return x === y ? a.localeCompare(b, "en", { numeric: true }) : x === null ? 1 : -1
    return x - y
  }

  const wordOf = cell => (cell.firstElementChild?.matches(".measured-value") ? cell.firstElementChild : cell).innerText.trim()

  const element = (name, properties) => Object.assign(document.createElement(name), properties)

  function enhance(table, number) {
    const body = table.tBodies[0]
    const rows = [...body.rows]
    const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]))
    const name = table.caption?.textContent.trim() || `table ${number}`
    let order = rows, all = false, wanted = ""
    const status = element("span", { className: "muted" })
    const more = element("button", { type: "button" })
    status.setAttribute("role", "status")

    const show = () => {
      const matching = order.filter(row => texts.get(row).includes(wanted))
      const shown = new Set(all ? matching : matching.slice(0, SHOWN))
      for (const row of rows) row.hidden = !shown.has(row)
      body.append(...order)
      status.textContent = shown.size < rows.length ? `${shown.size} of ${rows.length} rows` : ""
      more.hidden = shown.size === matching.length
      more.textContent = `show all ${matching.length}`
    }

    if (rows.length > 8 && !table.matches(".ledger")) {
      const tools = element("div", { className: "tools" })
      const label = element("label", { textContent: "Filter rows " })
      const input = element("input", { type: "search" })
      input.setAttribute("aria-label", `Filter rows of: ${name}`)
      input.addEventListener("input", () => { wanted = input.value.trim().toLowerCase(); show() })
      more.addEventListener("click", () => { all = true; show() })
      label.append(input)
      tools.append(label, status, more)
      table.closest(".scroll").before(tools)
    }

    for (const head of table.tHead.rows[0].cells) {
      const button = element("button", { type: "button" })
      button.append(...head.childNodes)
      head.append(button)
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending"
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort")
        head.setAttribute("aria-sort", down ? "descending" : "ascending")
        const keys = new Map(rows.map(row => [row, wordOf(row.cells[head.cellIndex])]))
        order = [...rows].sort((a, b) => compare(keys.get(a), keys.get(b)) * (down ? -1 : 1))
        show()
      })
    }
    show()
  }

  document.querySelectorAll("table.sortable").forEach(enhance)

  const tip = element("div", { className: "tip", hidden: true })
  tip.setAttribute("aria-hidden", "true")
  document.body.append(tip)
  document.querySelectorAll(".panel use").forEach(marker => {
    const title = marker.querySelector("title")
    if (!title) return
    const words = title.textContent
    title.remove() // or the browser shows it a second time
    marker.addEventListener("pointerenter", event => {
      tip.textContent = words
      tip.hidden = false
      tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`
      tip.style.top = `${event.clientY + 14}px`
    })
    marker.addEventListener("pointerleave", () => { tip.hidden = true })
  })
  addEventListener("beforeprint", () => document.querySelectorAll("table.sortable tr[hidden]").forEach(row => { row.hidden = false }))
})()
