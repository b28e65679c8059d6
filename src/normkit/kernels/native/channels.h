// Normalization per channel: batch norm in training and evaluation, with residual and activation.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "arguments.h"
#include "memory.h"
#include "plans.h"

namespace normkit::channels {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The slots by name, as `numba/slots.py` has them.
enum Slot { X, Y, RESIDUAL, DY, DX, DRESIDUAL, WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, DWEIGHT, DBIAS, MEAN, RSTD, PARTIALS, COEFFICIENTS };
enum Setting { EPS = 26, MOMENTUM, UNBIASED, FROZEN };

struct Cut {
  Key key;
  Program forward;
  Program backward;
  std::atomic<bool> has_backward{false};
  int64_t channels = 0;
  int64_t width = 0;  // columns of the table of coefficients, which stands at the end of the working memory
  at::ScalarType type = at::kFloat;
  bool last = false;
  bool residual = false;
  bool training = false;
  int64_t activation = 0;
};

// The slope of an activation behind a sum is decided by the sign of the output, but for silu by the residual.
inline bool keeps_output(int64_t activation) { return activation >= 1 && activation <= 3; }

inline PyObject* plan_in_python(const Cut& cut, bool backward) {
  Owned shape(shape_of(cut.key));
  PyObject* found = PyObject_CallFunction(
      callbacks().plan_channels, "OOszOOO", shape.object, dtype_of(cut.type), layout_of(cut.last),
      ACTIVATIONS[cut.activation], as_bool(cut.residual), as_bool(cut.training), as_bool(backward));
  if (found == nullptr) throw PythonError();
  return found;
}

// The cut for a call, planned in Python at the first one of its kind; null where Python should serve it.
inline Cut* cut_for(const Tensor& x, bool last, int64_t activation, bool residual, bool training) {
  const int64_t kind = (((static_cast<int64_t>(x.scalar_type()) * 2 + last) * 8 + activation) * 2 + residual) * 2 + training;
  const Key key = key_of(x, kind);
  return found_or_planned<Cut>(key, [&]() -> Planned<Cut> {
    auto cut = begin_plan<Cut>();
    cut->key = key;
    cut->type = x.scalar_type();
    cut->last = last;
    cut->activation = activation;
    cut->residual = residual;
    cut->training = training;
    cut->channels = x.size(1);
    Owned planned(plan_in_python(*cut, false));
    if (planned.object == Py_None) return nullptr;
    PyObject* program;
    long long width;
    if (!PyArg_ParseTuple(planned.object, "O!L", &PyTuple_Type, &program, &width)) throw PythonError();
    read_program(program, cut->forward);
    cut->width = width;
    return cut;
  });
}

// Plan the backward where it has not been yet. Python's lock guards it.
inline void plan_backward(Cut& cut) {
  if (cut.has_backward.load(std::memory_order_acquire)) return;
  under_lock([&] {
    Owned planned(plan_in_python(cut, true));
    Program program;
    read_program(planned.object, program);
    // Another thread may have planned it while Python's lock was given up.
    if (!cut.has_backward.load(std::memory_order_acquire)) {
      cut.backward = std::move(program);
      cut.has_backward.store(true, std::memory_order_release);
    }
    return true;
  });
}

// All tensors of a call, checked.
struct Call {
  Tensor x;
  MaybeTensor weight, bias, residual, running_mean, running_var;
  double eps = 0;
  double momentum = 0;
  bool unbiased = true;
};

// Point the slots at a call's own working memory: several threads may run backward over one graph.
inline void place(const Cut& cut, const Program& program, const Scratch& work, int64_t* slots) {
  slots[PARTIALS] = work.address();
  slots[COEFFICIENTS] = work.address() + 8 * (program.work - 5 * cut.width);
}

inline std::pair<Tensor, Tensor> forward(const Cut& cut, const Call& call) {
  const auto computed = computed_type(cut.type);
  const MaybeTensor weight = widened(call.weight, computed), bias = widened(call.bias, computed);
  const MaybeTensor mean = widened(call.running_mean, computed), var = widened(call.running_var, computed);
  Tensor y = output_like(call.x);
  Tensor saved = at::empty({2 * cut.channels}, at::kDouble);
  const Scratch work(cut.forward.work);
  std::array<int64_t, MAX_SLOTS> slots = cut.forward.slots;
  slots[X] = address(call.x);
  slots[Y] = address(y);
  slots[RESIDUAL] = address(call.residual);
  slots[WEIGHT] = address(weight);
  slots[BIAS] = address(bias);
  slots[RUNNING_MEAN] = address(mean);
  slots[RUNNING_VAR] = address(var);
  slots[MEAN] = address(saved);
  slots[RSTD] = address(saved) + 8 * cut.channels;
  place(cut, cut.forward, work, slots.data());
  stream_aligned(slots.data(), slots[Y]);
  slots[EPS] = bits(call.eps);
  slots[MOMENTUM] = bits(call.momentum);
  slots[UNBIASED] = call.unbiased;
  run(cut.forward, slots.data(), true);
  return {y, saved};
}

// Gradients where autograd, a transform or a hook asks for more than the kernel gives: Python's own backward.
inline variable_list backward_in_python(const Cut& cut, const Tensor& dy, const variable_list& saved, double eps) {
  return under_lock([&] {
    Owned tensors(tuple_of(saved)), cotangent(THPVariable_Wrap(dy));
    Owned found(PyObject_CallFunction(
        callbacks().channels_backward, "OOOzOOd", cotangent.object, tensors.object, as_bool(cut.last),
        ACTIVATIONS[cut.activation], as_bool(cut.residual), as_bool(cut.training), eps));
    if (!found) throw PythonError();
    return tensors_of(found.object);
  });
}

inline bool is_as_saved(const Tensor& value, const Cut& cut) {
  return has_shape(value, cut.key, cut.type) && (cut.last ? is_channels_last(value) : value.is_contiguous());
}

// Whether what autograd gave back is what was saved: a hook may have changed its memory format, type or device.
inline bool are_as_saved(const Cut& cut, const variable_list& saved) {
  const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &kept = saved[3], &other = saved[4];
  const auto parameter = [&](const Tensor& value) {
    return !value.defined() || (is_plain(value) && is_parameter_of(value, {cut.channels}, cut.type));
  };
  return is_as_saved(x, cut) && parameter(weight) && parameter(bias) && is_plain(kept) && kept.is_contiguous() &&
      kept.scalar_type() == at::kDouble && kept.numel() == 2 * cut.channels && (!other.defined() || is_as_saved(other, cut));
}

inline variable_list backward(Cut& cut, const Tensor& given, const variable_list& saved) {
  plan_backward(cut);
  const auto computed = computed_type(cut.type);
  const Tensor &x = saved[0], &kept = saved[3], &other = saved[4];
  const MaybeTensor weight = widened(if_defined(saved[1]), computed), bias = widened(if_defined(saved[2]), computed);
  const Tensor dy = laid_out(given, x);
  Tensor dx = output_like(x), dresidual;
  if (cut.residual) dresidual = cut.activation ? output_like(x) : dy;
  const auto options = x.options().dtype(computed);
  Tensor dweight = at::empty({cut.channels}, options), dbias = at::empty({cut.channels}, options);
  const Scratch work(cut.backward.work);
  std::array<int64_t, MAX_SLOTS> slots = cut.backward.slots;
  slots[X] = address(x);
  slots[RESIDUAL] = other.defined() ? address(other) : 0;
  slots[DY] = address(dy);
  slots[DX] = address(dx);
  slots[DRESIDUAL] = cut.residual && cut.activation ? address(dresidual) : 0;
  slots[WEIGHT] = address(weight);
  slots[BIAS] = address(bias);
  slots[DWEIGHT] = address(dweight);
  slots[DBIAS] = address(dbias);
  slots[MEAN] = address(kept);
  slots[RSTD] = address(kept) + 8 * cut.channels;
  place(cut, cut.backward, work, slots.data());
  stream_aligned(slots.data(), slots[DX] | slots[DRESIDUAL]);
  slots[FROZEN] = !cut.training;
  run(cut.backward, slots.data(), false);
  return {dx, typed(dweight, saved[1]), typed(dbias, saved[2]), dresidual};
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static Tensor forward(
      AutogradContext* context, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
      const MaybeTensor& residual, const Call* call, Cut* cut) {
    auto [y, saved] = channels::forward(*cut, *call);
    Tensor other;
    if (cut->residual && cut->activation) other = keeps_output(cut->activation) ? y : *residual;
    // Stored statistics are saved as tensors, so that autograd notices a change before the backward.
    const bool held = !cut->training;
    context->save_for_backward(
        {x, weight.value_or(Tensor()), bias.value_or(Tensor()), saved, other,
         held ? *call->running_mean : Tensor(), held ? *call->running_var : Tensor()});
    context->saved_data["cut"] = reinterpret_cast<int64_t>(cut);
    context->saved_data["eps"] = call->eps;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    Cut& cut = *reinterpret_cast<Cut*>(context->saved_data["cut"].toInt());
    const variable_list saved = context->get_saved_variables();
    const Tensor& dy = gradients[0];
    const bool ordinary = !at::GradMode::is_enabled() && is_undisturbed() && is_plain(dy) && dy.scalar_type() == cut.type &&
        dy.sizes() == saved[0].sizes() && is_aligned(dy) && are_as_saved(cut, saved);
    variable_list found = ordinary ? channels::backward(cut, dy, saved)
                                   : backward_in_python(cut, dy, saved, context->saved_data["eps"].toDouble());
    return {found[0], found[1], found[2], found[3], Tensor(), Tensor()};
  }
};

// Whether a running statistic may be written through its address, or read.
inline bool is_statistic(const MaybeTensor& value, int64_t channels, at::ScalarType type, bool written) {
  if (!is_parameter_of(value, {channels}, type) || requires_grad(value)) return false;
  return !written || (value->scalar_type() == computed_type(type) && !value->is_inference());
}

inline bool overlap(const Tensor& one, const MaybeTensor& other) {
  if (!other) return false;
  const int64_t a = address(one), b = address(*other);
  return a < b + static_cast<int64_t>(other->nbytes()) && b < a + static_cast<int64_t>(one.nbytes());
}

// Whether running statistics share memory with each other, or with what is read while they are written.
inline bool are_apart(const Call& call) {
  const Tensor &mean = *call.running_mean, &var = *call.running_var;
  for (const MaybeTensor* read : {&call.weight, &call.bias, &call.residual}) {
    if (overlap(mean, *read) || overlap(var, *read)) return false;
  }
  return !overlap(mean, call.running_var) && !overlap(mean, call.x) && !overlap(var, call.x);
}

// batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, unbiased, num_batches_tracked,
// activation, residual): the output, or None for Python to serve the call.
inline PyObject* batch_norm(PyObject* const* arguments) {
  Call call;
  MaybeTensor x, counter;
  bool training;
  int64_t activation;
  if (!take(arguments[0], x) || !x || !take(arguments[1], call.running_mean) || !take(arguments[2], call.running_var) ||
      !take(arguments[3], call.weight) || !take(arguments[4], call.bias) || !take_switch(arguments[5], training) ||
      !take_number(arguments[7], 0.0, 1e300, call.eps) || !take_switch(arguments[8], call.unbiased) ||
      !take(arguments[9], counter) || !take_activation(arguments[10], activation) || !take(arguments[11], call.residual)) {
    Py_RETURN_NONE;
  }
  const auto type = x->scalar_type();
  const int64_t dims = x->dim();
  if (!is_undisturbed() || dims < 2 || dims > 5 || !is_served(type) || !is_aligned(*x)) Py_RETURN_NONE;
  const int64_t channels = x->size(1), elements = x->numel();
  if (channels == 0 || elements == 0) Py_RETURN_NONE;
  const bool tracked = call.running_mean.has_value();
  if (tracked != call.running_var.has_value() || (training ? elements <= channels || call.eps <= 0 : !tracked)) Py_RETURN_NONE;
  const bool moves = training && tracked;
  if (!is_parameter_of(call.weight, {channels}, type) || !is_parameter_of(call.bias, {channels}, type)) Py_RETURN_NONE;
  if (tracked && (!is_statistic(call.running_mean, channels, type, moves) ||
                  !is_statistic(call.running_var, channels, type, moves))) {
    Py_RETURN_NONE;
  }
  if (counter && (counter->scalar_type() != at::kLong || counter->numel() != 1 || !is_aligned(*counter))) Py_RETURN_NONE;
  const bool averages = arguments[6] == Py_None;
  if (!averages && !take_number(arguments[6], 0.0, 1.0, call.momentum)) Py_RETURN_NONE;
  if (moves) {
    // A forward that is run again inside a backward moves nothing; Python knows.
    if (torch::autograd::get_current_graph_task_id() != -1 || is_inference(counter)) Py_RETURN_NONE;
    if (averages) {
      const int64_t seen = counter ? *static_cast<const int64_t*>(counter->const_data_ptr()) : -1;
      if (seen < 0) Py_RETURN_NONE;
      call.momentum = 1.0 / static_cast<double>(seen + 1);
    }
  }
  bool last = true;
  if (dims > 2) {
    last = !x->is_contiguous();
    if (last && !is_channels_last(*x)) Py_RETURN_NONE;
  } else if (!x->is_contiguous()) {
    Py_RETURN_NONE;
  }
  if (call.residual) {
    const Tensor& residual = *call.residual;
    if (residual.scalar_type() != type || residual.strides() != x->strides() || residual.sizes() != x->sizes() || !is_aligned(residual)) {
      Py_RETURN_NONE;
    }
  }
  call.x = *x;
  if (moves && !are_apart(call)) Py_RETURN_NONE;
  const bool recorded = at::GradMode::is_enabled() &&
      (x->requires_grad() || requires_grad(call.weight) || requires_grad(call.bias) || requires_grad(call.residual));
  if (recorded && (x->is_inference() || is_inference(call.weight) || is_inference(call.bias) || is_inference(call.residual) ||
                   is_inference(call.running_mean) || is_inference(call.running_var))) {
    Py_RETURN_NONE;
  }
  Cut* cut = cut_for(*x, last, activation, call.residual.has_value(), training);
  if (cut == nullptr) Py_RETURN_NONE;
  Tensor y;
  if (recorded) {
    y = BatchNorm::apply(*x, call.weight, call.bias, call.residual, static_cast<const Call*>(&call), cut);
  } else {
    at::NoGradGuard off;
    y = forward(*cut, call).first;
  }
  if (moves) {
    // The kernel wrote through the address: what autograd keeps of these buffers must still be noticed as stale.
    call.running_mean->unsafeGetTensorImpl()->bump_version();
    call.running_var->unsafeGetTensorImpl()->bump_version();
    if (counter) {
      ++*static_cast<int64_t*>(counter->data_ptr());
      counter->unsafeGetTensorImpl()->bump_version();
    }
  }
  return THPVariable_Wrap(std::move(y));
}

}  // namespace normkit::channels
