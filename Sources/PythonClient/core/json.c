// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <string.h>

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

static size_t skip_spaces(struct nw_text_range text, size_t at) {
    while (at < text.length && is_space(text.start[at])) at++;
    return at;
}

// From a quotation mark to the place after the one that ends it.
static size_t skip_string(struct nw_text_range text, size_t at) {
    for (at++; at < text.length; at++) {
        if (text.start[at] == '\\') at++;
        else if (text.start[at] == '"') return at + 1;
    }
    return text.length;
}

static size_t skip_value(struct nw_text_range text, size_t at) {
    int depth = 0;
    while (at < text.length) {
        char c = text.start[at];
        if (c == '"') {
            at = skip_string(text, at);
            if (!depth) return at;
            continue;
        }
        if (c == '{' || c == '[') depth++;
        if (!depth && (c == ',' || c == '}' || c == ']' || is_space(c))) return at;
        at++;
        if ((c == '}' || c == ']') && --depth == 0) return at;
    }
    return at;
}

bool nw_json_member(struct nw_text_range object, const char *name, struct nw_text_range *value) {
    size_t length = strlen(name), at = skip_spaces(object, 0);
    if (at >= object.length || object.start[at] != '{') return false;
    for (at = skip_spaces(object, at + 1); at < object.length && object.start[at] == '"';) {
        size_t end = skip_string(object, at);
        bool found = end - at == length + 2 && memcmp(object.start + at + 1, name, length) == 0;
        at = skip_spaces(object, end);
        if (at >= object.length || object.start[at] != ':') return false;
        at = skip_spaces(object, at + 1);
        end = skip_value(object, at);
        if (found) {
            *value = (struct nw_text_range){object.start + at, end - at};
            return !(value->length == 4 && memcmp(value->start, "null", 4) == 0);
        }
        at = skip_spaces(object, end);
        if (at < object.length && object.start[at] == ',') at = skip_spaces(object, at + 1);
    }
    return false;
}

bool nw_json_number(struct nw_text_range object, const char *name, uint64_t *number) {
    struct nw_text_range value;
    if (!nw_json_member(object, name, &value) || !value.length) return false;
    uint64_t found = 0;
    for (size_t i = 0; i < value.length; i++) {
        if (value.start[i] < '0' || value.start[i] > '9' || found > (UINT64_MAX - 9) / 10) return false;
        found = found * 10 + (uint64_t)(value.start[i] - '0');
    }
    *number = found;
    return true;
}

bool nw_json_is(struct nw_text_range object, const char *name, const char *text) {
    struct nw_text_range value;
    size_t length = strlen(text);
    return nw_json_member(object, name, &value) && value.length == length + 2 && value.start[0] == '"' &&
        memcmp(value.start + 1, text, length) == 0;
}
