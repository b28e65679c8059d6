// Normalization per sample: layer, RMS, group and instance norm.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "memory.h"
#include "plans.h"

namespace normkit::samples {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The slots by name, as `numba/slots.py` has them; those of `numba/samples/slots.py` are Python's to set.
enum Slot { X, Y, RESIDUAL, DY, DX, DRESIDUAL, WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, DWEIGHT, DBIAS, MEAN, RSTD, PARTIALS, COEFFICIENTS, OUTER, CHANNELS };
constexpr int EPS = 26;

// A backward, with or without the sums for weight and bias.
struct Backward {
  Program program;
  Program total;  // adds the rows of the tables of sums; without launches where there is one row
  int64_t chunks = 1;
  std::atomic<bool> ready{false};
};

struct Cut {
  Key key;
  Program forward;
  Backward backward[2];  // whether the sums are wanted
  int64_t rows = 0;      // groups of all samples: one mean and one rstd each
  int64_t channels = 0;
  int64_t work = 0;      // float64 numbers before the coefficients
  at::ScalarType type = at::kFloat;
  bool last = false;     // channels-last
  bool centred = true;
  bool trailing = false; // the last dimensions are normalized, and not groups of channels
  int64_t activation = 0;
};

inline PyObject* plan_in_python(const Cut& cut, int part) {
  Owned shape(shape_of(cut.key));
  PyObject* found = PyObject_CallFunction(
      callbacks().plan_samples, "OOszOOLi", shape.object, dtype_of(cut.type), layout_of(cut.last),
      ACTIVATIONS[cut.activation], as_bool(cut.centred), as_bool(cut.trailing), static_cast<long long>(cut.key.groups),
      part);
  if (found == nullptr) throw PythonError();
  return found;
}

inline Cut* cut_for(const Tensor& x, bool last, bool trailing, int64_t groups, bool centred, int64_t activation) {
  const int64_t kind = (((static_cast<int64_t>(x.scalar_type()) * 2 + last) * 8 + activation) * 2 + centred) * 2 + trailing;
  const Key key = key_of(x, kind, groups);
  return found_or_planned<Cut>(key, [&]() -> Planned<Cut> {
    auto cut = begin_plan<Cut>();
    cut->key = key;
    cut->type = x.scalar_type();
    cut->last = last;
    cut->centred = centred;
    cut->trailing = trailing;
    cut->activation = activation;
    Owned planned(plan_in_python(*cut, 0));
    if (planned.object == Py_None) return nullptr;
    PyObject* program;
    long long rows, channels, work;
    if (!PyArg_ParseTuple(planned.object, "O!LLL", &PyTuple_Type, &program, &rows, &channels, &work)) throw PythonError();
    read_program(program, cut->forward);
    cut->rows = rows;
    cut->channels = channels;
    cut->work = work;
    return cut;
  });
}

// Python's lock guards the planning.
inline void plan_backward(Cut& cut, bool wanted) {
  Backward& backward = cut.backward[wanted];
  if (backward.ready.load(std::memory_order_acquire)) return;
  under_lock([&] {
    Owned planned(plan_in_python(cut, wanted ? 2 : 1));
    PyObject *program, *total;
    long long chunks;
    if (!PyArg_ParseTuple(planned.object, "O!O!L", &PyTuple_Type, &program, &PyTuple_Type, &total, &chunks)) {
      throw PythonError();
    }
    Program steps, sums;
    read_program(program, steps);
    read_program(total, sums);
    if (!backward.ready.load(std::memory_order_acquire)) {
      backward.program = std::move(steps);
      backward.total = std::move(sums);
      backward.chunks = chunks;
      backward.ready.store(true, std::memory_order_release);
    }
    return true;
  });
}

// The slots of a call; an absent weight or bias keeps the address that the program has for it, of ones or zeros.
inline std::array<int64_t, MAX_SLOTS> slots_of(
    const Program& program, const Cut& cut, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
    const Tensor& saved, const Scratch& work) {
  std::array<int64_t, MAX_SLOTS> slots = program.slots;
  slots[X] = address(x);
  if (weight) slots[WEIGHT] = address(*weight);
  if (bias) slots[BIAS] = address(*bias);
  slots[MEAN] = address(saved);
  slots[RSTD] = address(saved) + 8 * cut.rows;
  slots[PARTIALS] = work.address();
  slots[COEFFICIENTS] = work.address() + 8 * cut.work;
  return slots;
}

inline std::pair<Tensor, Tensor> forward(
    const Cut& cut, const Tensor& x, const MaybeTensor& given_weight, const MaybeTensor& given_bias, double eps) {
  const auto computed = computed_type(cut.type);
  const MaybeTensor weight = widened(given_weight, computed), bias = widened(given_bias, computed);
  Tensor y = output_like(x), saved = at::empty({2, cut.rows}, at::kDouble);
  const Scratch work(cut.forward.work);
  auto slots = slots_of(cut.forward, cut, x, weight, bias, saved, work);
  slots[Y] = address(y);
  slots[EPS] = bits(eps);
  stream_aligned(slots.data(), slots[Y]);
  run(cut.forward, slots.data(), true);
  return {y, saved};
}

inline variable_list backward(Cut& cut, const Tensor& given, const variable_list& kept, bool wanted) {
  plan_backward(cut, wanted);
  const Backward& plan = cut.backward[wanted];
  const auto computed = computed_type(cut.type);
  const Tensor &x = kept[0], &saved = kept[3];
  const MaybeTensor weight = widened(if_defined(kept[1]), computed), bias = widened(if_defined(kept[2]), computed);
  const Tensor dy = laid_out(given, x);
  Tensor dx = output_like(x), tables;
  const auto options = x.options().dtype(computed);
  Tensor dweight, dbias;
  if (wanted) {
    dweight = at::empty({cut.channels}, options);
    dbias = at::empty({cut.channels}, options);
  }
  if (plan.program.tables) tables = at::empty({plan.program.tables}, options);
  const Scratch work(plan.program.work);
  auto slots = slots_of(plan.program, cut, x, weight, bias, saved, work);
  slots[DY] = address(dy);
  slots[DX] = address(dx);
  stream_aligned(slots.data(), slots[DX]);
  if (tables.defined()) {
    slots[DWEIGHT] = address(tables);
    slots[DBIAS] = address(tables) + static_cast<int64_t>(tables.element_size()) * plan.chunks * cut.channels;
  } else {
    slots[DWEIGHT] = wanted ? address(dweight) : 0;
    slots[DBIAS] = wanted ? address(dbias) : 0;
  }
  run(plan.program, slots.data(), false);
  if (wanted && !plan.total.launches.empty()) {
    std::array<int64_t, MAX_SLOTS> sums = plan.total.slots;
    sums[WEIGHT] = address(dweight);
    sums[BIAS] = address(dbias);
    sums[DWEIGHT] = slots[DWEIGHT];
    sums[DBIAS] = slots[DBIAS];
    run(plan.total, sums.data(), false);
  }
  const auto shaped = [](const Tensor& gradient, const Tensor& parameter) {
    if (!gradient.defined() || !parameter.defined()) return Tensor();
    return typed(gradient, parameter).view(parameter.sizes());
  };
  return {dx, shaped(dweight, kept[1]), shaped(dbias, kept[2])};
}

inline variable_list backward_in_python(const Cut& cut, const Tensor& dy, const variable_list& saved, double eps, bool wanted) {
  return under_lock([&] {
    Owned tensors(tuple_of(saved)), cotangent(THPVariable_Wrap(dy)), strides(strides_of(cut.key, cut.last));
    Owned found(PyObject_CallFunction(
        callbacks().samples_backward, "OOOsOLzOdO", cotangent.object, tensors.object, strides.object,
        layout_of(cut.last), as_bool(cut.trailing), static_cast<long long>(cut.key.groups),
        ACTIVATIONS[cut.activation], as_bool(cut.centred), eps, as_bool(wanted)));
    if (!found) throw PythonError();
    return tensors_of(found.object);
  });
}

inline bool are_as_saved(const Cut& cut, const variable_list& kept) {
  const Tensor &x = kept[0], &saved = kept[3];
  const auto parameter = [&](const Tensor& value) {
    return !value.defined() || (is_plain(value) && value.numel() == cut.channels && value.is_contiguous() && is_aligned(value));
  };
  return has_shape(x, cut.key, cut.type) && (cut.last ? is_channels_last(x) : x.is_contiguous()) && parameter(kept[1]) &&
      parameter(kept[2]) && is_plain(saved) && saved.is_contiguous() && saved.scalar_type() == at::kDouble &&
      saved.numel() == 2 * cut.rows;
}

struct SampleNorm : torch::autograd::Function<SampleNorm> {
  static Tensor forward(
      AutogradContext* context, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, double eps, Cut* cut) {
    auto [y, saved] = samples::forward(*cut, x, weight, bias, eps);
    context->save_for_backward({x, weight.value_or(Tensor()), bias.value_or(Tensor()), saved});
    context->saved_data["cut"] = reinterpret_cast<int64_t>(cut);
    context->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    Cut& cut = *reinterpret_cast<Cut*>(context->saved_data["cut"].toInt());
    const variable_list kept = context->get_saved_variables();
    // Absent parameters have no edge in the graph.
    size_t edge = 1;
    bool wanted = false;
    for (const Tensor& parameter : {kept[1], kept[2]}) {
      if (parameter.defined()) wanted = context->needs_input_grad(edge++) || wanted;
    }
    const Tensor& dy = gradients[0];
    const bool ordinary = !at::GradMode::is_enabled() && is_undisturbed() && is_plain(dy) && dy.scalar_type() == cut.type &&
        dy.sizes() == kept[0].sizes() && is_aligned(dy) && are_as_saved(cut, kept);
    variable_list found = ordinary
        ? samples::backward(cut, dy, kept, wanted)
        : backward_in_python(cut, dy, kept, context->saved_data["eps"].toDouble(), wanted);
    return {found[0], found[1], found[2], Tensor(), Tensor()};
  }
};

inline PyObject* serve(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, bool last, bool trailing, int64_t groups,
    bool centred, double eps, int64_t activation) {
  Cut* cut = cut_for(x, last, trailing, groups, centred, activation);
  if (cut == nullptr) Py_RETURN_NONE;
  if (at::GradMode::is_enabled() && (x.requires_grad() || requires_grad(weight) || requires_grad(bias))) {
    if (x.is_inference() || is_inference(weight) || is_inference(bias)) Py_RETURN_NONE;
    return THPVariable_Wrap(SampleNorm::apply(x, weight, bias, eps, cut));
  }
  at::NoGradGuard off;
  return THPVariable_Wrap(forward(*cut, x, weight, bias, eps).first);
}

// What both forms ask of the input and the settings.
inline bool take_common(
    PyObject* input, PyObject* weight, PyObject* bias, PyObject* eps, PyObject* activation, MaybeTensor& x,
    MaybeTensor& gamma, MaybeTensor& beta, double& added, int64_t& applied) {
  return take(input, x) && x && take(weight, gamma) && take(bias, beta) && take_number(eps, 0.0, 1e300, added) &&
      take_activation(activation, applied) && is_undisturbed() && is_served(x->scalar_type()) && is_aligned(*x) &&
      x->numel() > 0 && x->dim() <= MAX_DIMS;
}

// trailing_norm(input, normalized_shape, weight, bias, eps, centred, activation): the output, or None.
inline PyObject* trailing_norm(PyObject* const* arguments) {
  MaybeTensor x, weight, bias;
  double eps;
  int64_t activation;
  bool centred;
  if (!take_common(arguments[0], arguments[2], arguments[3], arguments[4], arguments[6], x, weight, bias, eps, activation) ||
      !take_switch(arguments[5], centred) || !PyTuple_Check(arguments[1])) {
    Py_RETURN_NONE;
  }
  const int64_t trailing = PyTuple_GET_SIZE(arguments[1]), dims = x->dim();
  if (trailing < 1 || trailing > dims || !x->is_contiguous()) Py_RETURN_NONE;
  for (int64_t k = 0; k < trailing; ++k) {
    PyObject* size = PyTuple_GET_ITEM(arguments[1], k);
    if (!PyLong_CheckExact(size) || as_integer(size) != x->size(dims - trailing + k)) Py_RETURN_NONE;
  }
  const auto shape = x->sizes().slice(dims - trailing);
  const auto type = x->scalar_type();
  if (!is_parameter_of(weight, shape, type) || !is_parameter_of(bias, shape, type)) Py_RETURN_NONE;
  return serve(*x, weight, bias, false, true, trailing, centred, eps, activation);
}

// group_norm(input, num_groups, weight, bias, eps, activation): the output, or None. No groups: one for each channel.
inline PyObject* group_norm(PyObject* const* arguments) {
  MaybeTensor x, weight, bias;
  double eps;
  int64_t activation;
  if (!take_common(arguments[0], arguments[2], arguments[3], arguments[4], arguments[5], x, weight, bias, eps, activation) ||
      x->dim() < 2) {
    Py_RETURN_NONE;
  }
  const int64_t channels = x->size(1);
  int64_t groups = channels;
  if (arguments[1] != Py_None) {
    if (!PyLong_CheckExact(arguments[1])) Py_RETURN_NONE;
    groups = as_integer(arguments[1]);
  } else if (x->dim() < 3) {
    Py_RETURN_NONE;
  }
  if (groups < 1 || channels % groups != 0 || x->numel() <= x->size(0) * groups) Py_RETURN_NONE;
  const auto type = x->scalar_type();
  if (!is_parameter_of(weight, {channels}, type) || !is_parameter_of(bias, {channels}, type)) Py_RETURN_NONE;
  const bool last = !x->is_contiguous();
  if (last && !is_channels_last(*x)) Py_RETURN_NONE;
  return serve(*x, weight, bias, last, false, groups, true, eps, activation);
}

}  // namespace normkit::samples
