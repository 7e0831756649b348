"""One browser and one JupyterLab for the session; skipped, with a reason, where there is none.

The server works on a copy of the notebooks, with settings of its own, and the browser reaches
nothing but this machine. What tests do in a page is in `pages_in_browser`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --disable-background-networking "
    "--disable-component-update --disable-sync --no-first-run"
).split()
SETTINGS = {
    # cells far down the page are in it, too
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {
        "fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on the path")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page in a context of its own, which only this machine's addresses reach."""
    with browser.new_context(viewport={"width": 1200, "height": 1000}) as context:
        context.set_default_timeout(60_000)
        context.route(lambda url: "//127.0.0.1:" not in url, lambda route: route.abort())
        yield context.new_page()


@pytest.fixture
def offline_page(browser):
    """A page that can open files, and a list of every other address it asked for."""
    with browser.new_context(viewport={"width": 1000, "height": 900}) as context:
        context.set_default_timeout(20_000)
        asked = []

        def refuse(route):
            if route.request.url.startswith(("file://", "data:")):
                route.continue_()
            else:
                asked.append(route.request.url)
                route.abort()

        context.route("**/*", refuse)
        yield context.new_page(), asked


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, data):
    """A copy of the notebooks, beside the kept studies as in the checkout."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "data").mkdir()
    (folder / "data" / "study").symlink_to(ROOT / "data" / "study")
    return folder


@pytest.fixture(scope="session")
def jupyter_environment(tmp_path_factory):
    """Variables that keep a server away from the settings of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("jupyter")
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    names = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython",
        "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }  # fmt: skip
    own = {name: str(folder / part) for name, part in names.items()}
    # a kernel starts in the copy of the notebooks and must find this checkout's library there
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@pytest.fixture(scope="session")
def lab(browser, workplace, jupyter_environment):
    """JupyterLab on the copy of the notebooks: its `url`, `token` and `notebooks`."""
    token = "lab-of-the-tests"
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0",
        "--allow-root", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={workplace}",
        "--expose-app-in-browser",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    runtime = Path(jupyter_environment["JUPYTER_RUNTIME_DIR"])
    with serving(command, jupyter_environment, workplace) as process:
        facts = wait_for(process, lambda: next(iter(runtime.glob("jpserver-*.json")), None))
        url = wait_for(process, lambda: json.loads(facts.read_text() or "{}").get("url"))
        yield SimpleNamespace(url=url, token=token, notebooks=workplace / "notebooks")


@pytest.fixture
def voila(browser, workplace, jupyter_environment, unused_port):
    """A function from a notebook (path) to the address at which Voilà serves it."""
    with ExitStack() as stack:

        def serve(notebook):
            port = unused_port()
            command = [
                sys.executable, "-m", "voila", "--no-browser", f"--port={port}",
                "--Voila.ip=127.0.0.1", "--show_tracebacks=True", str(notebook),
            ]  # fmt: skip
            process = stack.enter_context(serving(command, jupyter_environment, workplace))
            wait_for(process, lambda: answers(port))
            return f"http://127.0.0.1:{port}/"

        yield serve


@pytest.fixture(scope="session")
def unused_port():
    def find():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return find


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


@contextmanager
def serving(command, environment, folder):
    """A server in a session of its own, which is ended with its kernels."""
    path = folder / "server.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, cwd=folder, start_new_session=True,
        )  # fmt: skip
        process.log = path
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)  # it ends its kernels itself
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(process, find, seconds=60):
    """What `find` returns, as soon as it is something; an error if the server ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = find()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"no server: {process.log.read_text()[-2000:]}")
