// The schemas of all ops, and the module that Python imports to have them registered.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(gkd_d2, m) {
  m.def(
      "distillation_losses(Tensor[] student, Tensor[] teacher, Tensor[] student_grad, Tensor[] teacher_grad, "
      "Tensor boxes, SymInt[] box_counts, SymInt[] image_size, float[] weights, float temperature, str weighting, "
      "str rectifier, str map_region, bool save_state) -> (Tensor losses, Tensor state)");
  m.def(
      "distillation_losses_backward(Tensor loss_gradients, Tensor state, Tensor[] student, Tensor[] teacher, "
      "float[] weights) -> Tensor[]");
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddIntConstant(module, "INTERFACE_VERSION", GKD_INTERFACE_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", GKD_CUDA_ARCHITECTURES) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
