// Schemas of the kernels, and an empty Python module: importing it loads the shared object, which registers
// torch.ops.ddpo.*
//
// The vector unit it was built for is read from the file's bytes before that (ddpo/ops/cpp.py): on a machine without it
// even the registration may be an instruction that the machine does not know.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(ddpo, m) {
  m.def(
      "linear_logp_fwd(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, float scale, float? softcap, "
      "bool want_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_logp_sparse_fwd(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, float scale, float? softcap, "
      "Tensor segments, float drop_below, bool head_trained) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logp_sparse_bwd(Tensor hidden, Tensor targets, Tensor segments, Tensor upstream, float scale, "
      "Tensor slope, Tensor ends, Tensor kept_rows, Tensor kept, Tensor tail, Tensor share, bool want_head, "
      "bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "linear_logp_bwd(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, float scale, float? softcap, "
      "Tensor lse, Tensor upstream, bool want_hidden, bool want_head, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, bool want_weight) -> "
      "(Tensor, Tensor)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale, int? window, "
      "float? softcap) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_bwd(Tensor upstream, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, float scale, int? window, float? softcap) -> (Tensor, Tensor, Tensor)");
  m.def("mean_cosine(Tensor embeddings, Tensor groups) -> Tensor");
  m.def(
      "add_distances(Tensor block, Tensor x, Tensor y, Tensor x_squares, Tensor y_squares, Tensor(a!) by_row, "
      "Tensor(b!) by_column, bool same, bool is_squared) -> ()");
  m.def("allocate_tightly(bool on) -> ()");
}

#define DDPO_TEXT_OF(x) #x
#define DDPO_TEXT(x) DDPO_TEXT_OF(x)
#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY DEFAULT
#endif
extern "C" __attribute__((used, visibility("default"))) const char ddpo_built_for[] =
    "ddpo._C built for " DDPO_TEXT(CPU_CAPABILITY) ";";

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
