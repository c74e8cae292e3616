"""Colours and type of the page, light and dark, from this machine's own fonts."""

import gradio as gr

FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def studio_theme() -> gr.themes.Base:
    """Gradio's parts in the colours that static/studio.css names: paper, ink and one accent."""
    theme = gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        spacing_size="md",
        text_size="md",
        font=FONT,
        font_mono=MONO,
    )
    return theme.set(
        **_both("body_background_fill", "--st-paper"),
        **_both("body_text_color", "--st-ink"),
        **_both("body_text_color_subdued", "--st-faint"),
        **_both("background_fill_primary", "--st-card"),
        **_both("background_fill_secondary", "--st-paper"),
        **_both("block_background_fill", "--st-card"),
        **_both("block_border_color", "--st-line"),
        **_both("block_label_background_fill", "--st-card"),
        **_both("block_label_text_color", "--st-faint"),
        **_both("block_title_text_color", "--st-ink"),
        **_both("block_info_text_color", "--st-faint"),
        **_both("border_color_primary", "--st-line"),
        **_both("input_background_fill", "--st-field"),
        **_both("input_background_fill_focus", "--st-field"),
        **_both("input_border_color", "--st-line"),
        **_both("input_border_color_focus", "--st-accent"),
        color_accent="var(--st-accent)",
        **_both("color_accent_soft", "--st-soft"),
        **_both("slider_color", "--st-accent"),
        **_both("button_primary_background_fill", "--st-accent"),
        **_both("button_primary_background_fill_hover", "--st-accent-strong"),
        **_both("button_primary_text_color", "--st-on-accent"),
        **_both("button_secondary_background_fill", "--st-field"),
        **_both("button_secondary_text_color", "--st-ink"),
        **_both("button_secondary_border_color", "--st-line"),
        input_border_width="1px",
        block_border_width="0px",
        block_shadow="none",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_padding="4px 0px",
        button_large_text_weight="600",
        button_primary_shadow="none",
        layout_gap="14px",
    )


def _both(name: str, variable: str) -> dict[str, str]:
    """A setting for light and dark alike: the variable itself knows which it is."""
    return {name: f"var({variable})", f"{name}_dark": f"var({variable})"}
