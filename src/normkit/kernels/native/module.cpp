// The Python module `normkit_native`: what `kernels/native/calls.py` calls.
#include "channels.h"
#include "samples.h"

namespace {

template <PyObject* (*serve)(PyObject* const*), Py_ssize_t expected>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == expected, "expected ", expected, " arguments, got ", count);
  try {
    return serve(arguments);
  } catch (normkit::PythonError&) {
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

// Take the functions of Python that plan calls, those that compute gradients which are to be differentiated again, and
// the one that says how much memory may be kept of outputs of so many bytes or more.
PyObject* configure(PyObject*, PyObject* arguments) {
  normkit::Callbacks given;
  long long kept_from;
  if (!PyArg_ParseTuple(
          arguments, "OOOOOL", &given.plan_channels, &given.plan_samples, &given.channels_backward,
          &given.samples_backward, &given.grant, &kept_from)) {
    return nullptr;
  }
  given.kept_from = static_cast<size_t>(kept_from);
  Py_INCREF(arguments);  // keeps them for as long as the process lives
  normkit::callbacks() = given;
  normkit::watch_for_forks();
  normkit::plain_keys();
  Py_RETURN_NONE;
}

// watch(function): be told the address of every kernel that is launched; None ends it.
PyObject* watch(PyObject*, PyObject* function) {
  PyObject* given = function == Py_None ? nullptr : function;
  Py_XINCREF(given);
  Py_XDECREF(normkit::watcher().exchange(given));
  Py_RETURN_NONE;
}

// empty_like(x): an uninitialized tensor like x, which is packed, in memory that may have served before.
PyObject* empty_like(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(THPVariable_Check(tensor), "expected a tensor");
  try {
    return THPVariable_Wrap(normkit::output_like(THPVariable_Unpack(tensor)));
  } catch (normkit::PythonError&) {
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

// kept(): how many bytes are kept free for the next outputs.
PyObject* kept(PyObject*, PyObject*) { return PyLong_FromSize_t(normkit::Kept::of_process().size()); }

// release(): give all of it back to the system.
PyObject* release(PyObject*, PyObject*) {
  normkit::Kept::of_process().release();
  Py_RETURN_NONE;
}

PyCFunction as_function(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"batch_norm", as_function(call<normkit::channels::batch_norm, 12>), METH_FASTCALL, nullptr},
    {"trailing_norm", as_function(call<normkit::samples::trailing_norm, 7>), METH_FASTCALL, nullptr},
    {"group_norm", as_function(call<normkit::samples::group_norm, 6>), METH_FASTCALL, nullptr},
    {"empty_like", empty_like, METH_O, nullptr},
    {"kept", kept, METH_NOARGS, nullptr},
    {"release", release, METH_NOARGS, nullptr},
    {"watch", watch, METH_O, nullptr},
    {"configure", configure, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "normkit_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_normkit_native() { return PyModule_Create(&definition); }
