def padding(examination: Examination) -> Iterator[Finding]:
    """Find padded positions that are counted as data."""
    for subject in examination.subjects:
        measured = examination.measured.get(subject.name)
        if measured is None or measured.padding is None or not subject.is_batch or not measured.padding.ragged:
            continue
        shares = measured.padding.shares
        average, spread = sum(shares) / len(shares), max(shares) - min(shares)
        if (average <= PADDING_SHARE and spread <= PADDING_SPREAD) or not measured.padding.valid:
            continue
        lengthened = examination.lengthened.get(subject.name)
        if lengthened is not None and lengthened <= PADDING_UNMOVED:
            continue  # more of it changes nothing: it is masked
        valid = measured.padding.valid
        ratio = torch.log2((measured.pooled.var + subject.eps) / (valid.var + subject.eps))
        moved = float((ratio.abs() > PADDING_LOG_RATIO).double().mean())
        yield Finding(
            check="padding",
            layer=subject.name,
            severity="error" if moved >= DRIFT_SHARE else "warning",
            summary=f"{average:.0%} of the positions are padding, and they count in the mean and the variance"
            + (f": half as much again moves the data's outputs by {lengthened:.2g}" if lengthened is not None else ""),
            evidence={
                "padded_share": average,
                "spread_over_batches": spread,
                "channels_moved": moved,
                "log2_ratio_99th_percentile": percentile(ratio.abs()),
                "moved_by_longer_padding": lengthened,
            },
            causes=(
                "sequences of different lengths, filled up to the longest of the batch",
                "signals that end in silence: then these are data, and nothing is wrong",
            ),
            remedy=f'model = normkit.convert(model, to="layer", where={{layer}}).model  # then train again',
            proof=f'not normkit.diagnose(model, batches).of("padding", {{layer}})',
            channels={"log2_ratio": tuple(ratio.tolist())},
        )


    Check(
        name="padding",
        question="Does padding count as data?",
        needs="batches",
        examine=padding,
        innocent=("signals that end in silence",),
    ),
