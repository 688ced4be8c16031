"""What a machine without CUDA, or a Mac, lacks is neither imported nor used unasked."""

import ast

from tests.sources import modules

# Libraries for CUDA or Linux alone, and what the standard library has on Linux alone.
ABSENT_MODULES = {
    "triton",
    "pynvml",
    "cupy",
    "flash_attn",
    "xformers",
    "bitsandbytes",
    "nvidia",
    "apex",
    "pyudev",
    "spwd",
}
ABSENT_NAMES = {
    "os": {
        "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create", "eventfd",
        "copy_file_range", "splice", "pidfd_open", "O_DIRECT", "O_TMPFILE", "pipe2",
    },
    "signal": {"sigwaitinfo", "sigtimedwait", "SIGRTMIN", "SIGPWR", "pidfd_send_signal"},
    "select": {"epoll"},
    "socket": {"AF_NETLINK"},
}  # fmt: skip


# Files for CUDA alone, imported where a tensor is on CUDA.
FOR_CUDA = {"loss/kernels.py"}


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def at_import(node):
    """Yield what runs when a module is imported: all but the bodies of functions, and annotations."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.AnnAssign):
            yield from at_import(child.value) if child.value else ()
            continue
        yield child
        yield from at_import(child)


def test_only_files_for_cuda_import_a_library_that_exists_for_cuda_or_linux_alone():
    found = {(str(path), name) for path, _, tree in modules() for name in imported(ast.walk(tree))}
    assert {path for path, name in found if name.partition(".")[0] in ABSENT_MODULES} == FOR_CUDA
    assert not {(path, name) for path, name in found if name.startswith("torch.cuda")}


def test_files_for_cuda_are_not_imported_with_the_package():
    names = {f"clip_train.{path.removesuffix('.py').replace('/', '.')}" for path in FOR_CUDA}
    for path, _, tree in modules():
        typing_only = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        hidden = {id(inner) for node in typing_only for inner in ast.walk(node)}
        assert not names & {*imported(node for node in at_import(tree) if id(node) not in hidden)}, path


def test_nothing_asks_for_cuda_while_it_is_imported():
    for path, _, tree in modules():
        assert not any(
            isinstance(node, ast.Attribute)
            and node.attr == "cuda"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            for node in at_import(tree)
        ), path


def test_what_macos_lacks_is_used_only_where_its_absence_is_checked():
    used = set()
    for path, source, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = node.value.id, node.attr
                if name in ABSENT_NAMES.get(module, ()):
                    used.add(name)
                    assert f'hasattr({module}, "{name}")' in source, f"{path}: {module}.{name}"
        if "prctl(" in source:
            assert 'sys.platform == "linux"' in source, path
    assert {"sched_getaffinity", "sigwaitinfo"} <= used  # the search finds what there is
