"""Colours and type of the page, light and dark, from this machine's own fonts."""

import gradio as gr

FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

# Gradio's setting -> the variable of static/studio.css, which knows light from dark.
COLOURS = {
    "body_background_fill": "--st-paper",
    "body_text_color": "--st-ink",
    "body_text_color_subdued": "--st-faint",
    "background_fill_primary": "--st-card",
    "background_fill_secondary": "--st-paper",
    "block_background_fill": "--st-card",
    "block_border_color": "--st-line",
    "block_label_background_fill": "--st-card",
    "block_label_text_color": "--st-faint",
    "block_title_text_color": "--st-ink",
    "block_info_text_color": "--st-faint",
    "border_color_primary": "--st-line",
    "input_background_fill": "--st-field",
    "input_background_fill_focus": "--st-field",
    "input_border_color": "--st-line",
    "input_border_color_focus": "--st-accent",
    "color_accent_soft": "--st-soft",
    "slider_color": "--st-accent",
    "button_primary_background_fill": "--st-accent",
    "button_primary_background_fill_hover": "--st-accent-strong",
    "button_primary_text_color": "--st-on-accent",
    "button_secondary_background_fill": "--st-field",
    "button_secondary_text_color": "--st-ink",
    "button_secondary_border_color": "--st-line",
}


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
    colours = {
        f"{name}{mode}": f"var({variable})"
        for name, variable in COLOURS.items()
        for mode in ("", "_dark")
    }
    return theme.set(
        **colours,
        color_accent="var(--st-accent)",
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
