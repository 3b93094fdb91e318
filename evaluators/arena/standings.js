// Asks for the standings while somebody looks at them.
const box = element.querySelector(".board");
let shown = "";
async function refresh() {
  if (!element.isConnected || document.hidden || !box.offsetParent) return;
  const reply = await server.board({});
  if (!reply || reply.html === shown) return;
  shown = reply.html;
  box.innerHTML = shown; // the server has escaped every name in it
}
element.addEventListener("click", async (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const text = [...button.parentElement.querySelector("pre").childNodes]
    .filter((node) => !node.classList).map((node) => node.textContent.trim()).filter(Boolean).join("\n");
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch { button.textContent = "Select and copy by hand"; }
});
new IntersectionObserver(refresh).observe(box);
setInterval(refresh, 3000);
refresh();
