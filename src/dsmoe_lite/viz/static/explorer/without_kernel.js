// ---- Answers where no kernel answers: JupyterLab's server lends the scripts of the book's pages (viz/page_models.py)

const KERNEL_SAYS_HELLO = 1500; // ms until a page helps itself: no kernel, or one that is busy
const LENT = ["engine", "models", "compute", "answers"]; // in the order of loading

// Load them once per page; false where nobody lends them.
function borrow() {
  const config = document.getElementById("jupyter-config-data");
  if (!config) return Promise.resolve(false);
  const folder = `${JSON.parse(config.textContent).baseUrl}static/dsmoe/`;
  const load = (name) => new Promise((resolve, reject) => {
    document.head.append(make("script", { src: `${folder}${name}.js`, onload: resolve, onerror: reject }));
  });
  window.dsmoeBorrowed ??= LENT.reduce((before, name) => before.then(() => load(name)), Promise.resolve())
    .then(() => true, () => false);
  return window.dsmoeBorrowed;
}

// What answers in the place of the kernel, called with each message; null if the page cannot run these models.
async function withoutKernel(model, onMessage) {
  const saved = { live: model.get("live"), views: model.get("views") };
  if (!saved.live?.models?.length || !(await borrow()) || !window.dsmoeAnswers.can(saved)) return null;
  const answers = new window.dsmoeAnswers(saved);
  const widget = {
    get: (name) => model.get(name),
    set: (name, value) => model.set(name, value),
    emit: (_, content) => onMessage(content),
  };
  return (message) => answers.receive(widget, message);
}
