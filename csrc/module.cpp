// An empty Python module: importing it loads the shared object, which registers torch.ops.ddpo.*
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(ddpo, m) {
  m.def("row_logp_(Tensor(a!) z, Tensor targets, bool grad) -> Tensor");
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
