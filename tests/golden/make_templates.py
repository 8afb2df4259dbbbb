#!/usr/bin/env python3
"""What transformers makes of small pieces of templates, and of whole ones in the styles of well-known families.

    python make_templates.py templates.json

Every piece is rendered by the environment that apply_chat_template compiles for it, with the clock stopped. A piece or a conversation that
Python refuses has null for its text. What is said goes to each template in the form that it takes. All templates were written for this file.
"""

import datetime
import json
import sys

import jinja2
import transformers
import transformers.utils.chat_template_utils as utils

NOW = datetime.datetime(2024, 7, 4, 9, 5, 3, 70000, tzinfo=datetime.timezone.utc)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW.replace(tzinfo=None)


DATA = {
    "text": "The café \"Zoë\" isn't <b>open</b> & 你好 😀",
    "lines": "one\ntwo\r\n\n  three\t\nfour",
    "path": "a/b/c.d.e",
    "words": ["pear", "Apple", "fig"],
    "numbers": [3, 1, 2, 10],
    "floats": [1.0, 0.1, 1e16, 1.5e-7, 123456789.125, -0.0, 1e22, 0.0001, 1e15],
    "nested": {"b": [1, 2.5, None, True], "a": {"x": "é"}, "list": [], "none": None, "items": "an item", "empty": {}},
    "people": [{"name": "Ada", "age": 36, "town": {"name": "Ely"}}, {"name": "Bob", "age": 20, "town": {"name": "York"}},
               {"name": "cyd", "age": 36}],
    "schema": {"type": "object", "properties": {"items": {"type": "array"}, "get": {"type": "string"}}, "required": ["get"]},
}

# What the data is called in a piece: `tools` is the one name for which both sides take any value.
PIECES = r"""
{{ tools.nested | tojson }}
{{ tools.nested | tojson(indent=2) }}
{{ tools.nested | tojson(indent='--') }}
{{ tools.nested | tojson(indent=0) }}
{{ tools.nested | tojson(separators=(',', ':')) }}
{{ tools.nested | tojson(separators=[' , ', ' = '], indent=1) }}
{{ tools.nested | tojson(sort_keys=true) }}
{{ tools.nested | tojson(sort_keys=True, ensure_ascii=True, indent=4) }}
{{ tools.text | tojson }}|{{ tools.text | tojson(ensure_ascii=true) }}|{{ tools.text | tojson(True) }}
{{ "\x01\x1f\x7f\b\f/\\" | tojson }}
{{ tools.floats | tojson }}
{{ (1, 'two', none) | tojson }}{{ {1: 2, none: 3, true: 4, 1.5: 6} | tojson }}
{{ missing | tojson }}
{{ tools.nested.items() | tojson }}
{{ range(3) | tojson }}
{{ {(1, 2): 3} | tojson }}
{{ tools.nested | tojson(indnt=2) }}
{{ {'b': 1, 1: 2} | tojson(sort_keys=true) }}
{{ tools.nested }}
{{ tools.people }}
{{ tools.floats }}
{{ tools.floats | join(' ') }}
{{ tools.floats | string }} {{ 'x' ~ tools.floats[1:3] }}
{{ [true, false, none] }} {{ true }} {{ none }} {{ 'a' ~ none ~ true ~ 1.0 }}
{{ ['it\'s', 'say "hi"', 'both \' and "', 'tab\t nl\n \\ \x00 \x7f é 你 😀 \u200b \xa0 \u2028'] }}
{{ (1, 2) }} {{ (1,) }} {{ () }} {{ 1, 2 }} {{ [(1, 'a')] }}
{{ {'a': (1, [2]), 1: 'x', none: none} }}
{{ range(3) }} {{ range(1, 9, 2) }} {{ range(3) | list }} {{ range(5, 0, -2) | list }}
{{ {'a': 1}.items() }} {{ {'a': 1}.keys() }} {{ {'a': 1}.values() }} {{ {'a': 1}.items() | list }}
{{ {'a': 1} | items | list }} {{ tools.words | map('upper') | list }}
{{ 1e300 * 1e300 }} {{ 7 / 2 }} {{ 4 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 // -2 }} {{ 7 % -3 }} {{ -7 % 3 }} {{ -7.5 % 2 }} {{ 7.5 // 2 }}
{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2 ** 0.5 }} {{ -2 ** 2 }} {{ 10 % 3 * 2 }} {{ 2 + 3 * 4 - 1 }} {{ 1 - 2 - 3 }}
{{ 1 / 0 }}
{{ 1 % 0 }}
{{ 1 == 1.0 }} {{ 1 == true }} {{ '1' == 1 }} {{ [1, 2] == [1, 2] }} {{ (1, 2) == [1, 2] }} {{ {'a': 1} == {'a': 1.0} }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' < 'b' }} {{ 'Z' < 'a' }} {{ [1, 2] < [1, 3] }} {{ 2 > 1 == true }}
{{ 1 < 'a' }}
{{ none < 1 }}
{{ 'a' + 1 }}
{{ 'a' + none }}
{{ 1 + none }}
{{ [1] + (2,) }}
{{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ 'ab' * -1 }} {{ [1, 'x'] * 2 }} {{ (1,) * 3 }} {{ 'ab' * true }}
{{ 'ab' * 1.5 }}
{{ 0x1f }} {{ 0b101 }} {{ 0o17 }} {{ 1_000 }} {{ 1e3 }} {{ 1.50 }}
{{ .5 }}
{{ 10 }} {{ 1.5e3 }} {{ 2.0 }} {{ 1E5 }} {{ 100000000000000000000 }}
{{ not true }} {{ not '' }} {{ 1 and 2 }} {{ 0 or 'x' }} {{ none and 1 }} {{ [] or {} }} {{ 1 if 0 }}| {{ 1 if 0 else 2 if 0 else 3 }}
{{ 'b' in 'abc' }} {{ 'b' not in 'abc' }} {{ 2 in [1, 2] }} {{ 'x' in {'x': 1} }} {{ 1 in (1, 2) }} {{ '' in 'a' }} {{ 1 in missing }}
{{ 1 in 'abc' }}
{{ 1 in 5 }}
{{ 'abc'[0] }} {{ 'abc'[-1] }} {{ 'abc'[5] }}| {{ 'abcdef'[1:3] }} {{ 'abcdef'[-3:] }} {{ 'abcdef'[:-2] }} {{ 'abcdef'[::2] }} {{ 'abcdef'[::-1] }}
{{ 'abcdef'[4:1:-1] }} {{ 'abcdef'[-2:-5:-1] }} {{ 'abcdef'[2:5:-1] }}| {{ 'abcdef'[10:] }}| {{ 'héllo wörld'[1:4] }} {{ '😀ab'[1] }}
{{ tools.numbers[1:] }} {{ tools.numbers[::-1] }} {{ tools.numbers[-2:] }} {{ tools.numbers[:-1] }} {{ (1, 2, 3)[1:] }} {{ tools.numbers[9:] }}
{{ 'abc'[::0] }}
{{ 'abc'['x'] }}| {{ [1]['x'] }}| {{ [1][5] }}| {{ {'a': 1}['b'] }}| {{ {'a': 1}.b }}| {{ {1: 'one'}[1] }} {{ none.x }}|
{{ missing }}| {{ missing ~ 'x' }} {{ missing is defined }} {{ missing | default('d') }} {{ '' | default('d', true) }} {{ none | default('d') }}
{{ missing.x }}
{{ missing + 1 }}
{{ missing() }}
{{ none() }}
{{ missing == missing }} {{ missing | length }} {{ missing | upper }}| {{ missing | list }} {% for x in missing %}x{% endfor %}|
{{ missing < 1 }}
{{ tools.nested.items is callable }} {{ tools.nested['items'] }} {{ tools.schema.properties['items'] }} {{ tools.schema.properties.items() | list }}
{% for k, v in tools.schema.properties.items() %}{{ k }}={{ v.type }};{% endfor %} {{ tools.schema.properties.get('get').type }}
{{ tools.nested.get('zzz') }} {{ tools.nested.get('zzz', 'd') }} {{ tools.nested.get('none', 'd') }} {{ tools.nested.keys() | list }}
{{ tools.nested.values() | list | length }} {{ tools.nested | length }} {{ tools.nested.copy() == tools.nested }}
{{ tools.nested.pop('b') }}
{{ tools.nested.update({'x': 1}) }}
{{ tools.nested.setdefault('x', 1) }}
{{ tools.numbers.append(4) }}
{% do tools.numbers.append(4) %}
{{ tools.numbers.sort() }}
{{ tools.numbers.index(2) }} {{ tools.numbers.count(3) }} {{ (1, 2, 1).count(1) }} {{ tools.numbers.copy() }}
{{ tools.numbers.index(99) }}
{{ tools.numbers.__class__ }}|
{{ tools.numbers.__class__.__mro__ }}
{{ ''.__class__() }}
{{ tools.path.split('/') }} {{ tools.path.split('/', 1) }} {{ tools.path.rsplit('.', 1) }} {{ tools.path.rsplit('.') }} {{ tools.path.split('zz') }}
{{ '  a b   c '.split() }} {{ '  a b   c '.split(none, 1) }} {{ '  a b   c '.rsplit(none, 1) }} {{ '  '.split() }} {{ ''.split('x') }} {{ ' a '.split(' ') }}
{{ 'a,b,c'.split(',', maxsplit=1) }} {{ 'a,b,c'.rsplit(sep=',', maxsplit=1) }}
{{ 'abc'.split('') }}
{{ tools.path.partition('/') }} {{ tools.path.rpartition('/') }} {{ 'x'.partition('/') }} {{ 'x'.rpartition('/') }}
{{ tools.path.index('c') }} {{ tools.path.rindex('/') }} {{ tools.path.find('z') }} {{ tools.path.rfind('.') }} {{ 'ünü'.find('ü', 1) }} {{ 'abcabc'.find('c', 0, 2) }}
{{ tools.path.index('z') }}
{{ 'ab'.ljust(5) }}|{{ 'ab'.rjust(5) }}|{{ 'ab'.rjust(5, '*') }}|{{ 'ab'.center(5) }}|{{ 'ab'.center(7, '-') }}|{{ 'abc'.center(6, '-') }}|{{ '-5'.zfill(5) }} {{ '5'.zfill(3) }} {{ 'é'.ljust(3, '·') }}
{{ 'ab'.ljust(5, 'xy') }}
{{ 'TestHook'.removeprefix('Test') }} {{ 'TestHook'.removesuffix('Hook') }} {{ 'TestHook'.removeprefix('Hook') }}
{{ tools.lines.splitlines() }} {{ tools.lines.splitlines(true) }} {{ 'a\x0bb\x85c\u2028d'.splitlines() }} {{ ''.splitlines() }}
{{ 'STRAßE'.casefold() }} {{ 'Straße'.upper() }} {{ 'ÀÉ'.lower() }} {{ "they're bill's".title() }} {{ 'hELLO wORLD'.capitalize() }} {{ 'aBc'.swapcase() }}
{{ "they're (bill's) own-er" | title }} {{ 'hELLO' | capitalize }} {{ 'Ab' | upper }} {{ 'Ab' | lower }}
{{ ' \t x y \n'.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'abcba'.lstrip('ab') }}|{{ 'abcba'.rstrip('ab') }}|{{ '  x ' | trim }}|{{ 'xxax' | trim('x') }}|{{ '\x1cx\x1f'.strip() }}
{{ 'a-b-c'.replace('-', '+') }} {{ 'a-b-c'.replace('-', '+', 1) }} {{ 'abc'.replace('', '.') }} {{ 'aaa' | replace('a', 'b', 2) }} {{ 5 | replace('5', '6') }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.endswith(('x', 'y')) }} {{ 'abc'.startswith('b', 1) }} {{ 'abc'.endswith('b', 0, 2) }}
{{ 'abc'.startswith(['x', 'a']) }}
{{ 'banana'.count('an') }} {{ 'banana'.count('') }} {{ 'banana'.count('a', 2) }}
{{ ', '.join(tools.words) }} {{ ''.join(['a']) }} {{ '-'.join('abc') }} {{ ','.join({'a': 1, 'b': 2}) }}
{{ ', '.join([1, 2]) }}
{{ tools.words | join(', ') }} {{ [1, none, true] | join('|') }} {{ tools.people | join(',', attribute='name') }} {{ 'abc' | join('.') }}
{{ ''.isdigit() }} {{ '12'.isdigit() }} {{ 'a1'.isalnum() }} {{ 'ab'.isalpha() }} {{ ' '.isspace() }} {{ 'AB'.isupper() }} {{ 'a1'.islower() }} {{ '1'.islower() }} {{ 'é'.isascii() }} {{ 'Ab Cd'.istitle() }} {{ '½'.isnumeric() }} {{ '½'.isdigit() }} {{ 'a_1'.isidentifier() }}
{{ 'a\tb'.expandtabs(4) }}
{{ '{} and {}'.format('a', 1.5) }} {{ '{1}{0}'.format('a', 'b') }} {{ '{x:>5}|{y:<4}|{z:^5}'.format(x='a', y=1, z=2.5) }} {{ '{{}}'.format() }}
{{ '{:05d} {:+.2f} {:,} {:x} {:#x} {:e} {:.3} {:g} {:%}'.format(42, 3.14159, 1234567, 255, 255, 12345.678, 2.0, 0.00001, 0.25) }}
{{ '{0[a]} {1.b} {2!r:>8}'.format({'a': 1}, {'b': 2}, 'x') }}
{{ '{:{}}|{:*^{w}}'.format('a', 4, 'b', w=5) }}
{{ '{:.3}'.format('abcdef') }} {{ '{}'.format(none) }} {{ '{}'.format([1, 'a']) }} {{ '{!s}'.format(true) }} {{ '{:d}'.format(true) }} {{ '{:>6.1f}'.format(2.25) }}
{{ '{}'.format() }}
{{ '{:d}'.format('a') }}
{{ '{'.format(1) }}
{{ '%s: %d' % ('a', 3) }} {{ '%s' % 'x' }} {{ '%s' % [1, 2] }} {{ '%5s|%-5s|%05d|%+d' % ('a', 'b', 42, 7) }} {{ '%.2f %5.1f %e %g' % (3.14159, 2.25, 12345.678, 0.0001) }}
{{ '%(name)s is %(age)d' % {'name': 'Ada', 'age': 36} }} {{ '%x %X %o %#x %c %%' % (255, 255, 8, 255, 'z') }} {{ '%r' % 'it' }} {{ '%.2s' % 'abc' }} {{ '%*d' % (5, 42) }} {{ '%d' % 3.9 }} {{ '%.3d' % 5 }} {{ '%-+6d|' % 5 }}
{{ '%s %s' % ('a',) }}
{{ '%s' % ('a', 'b') }}
{{ '%d' % 'a' }}
{{ 'plain' % {} }} {{ 'plain' % [] }}
{{ 'plain' % 1 }}
{{ '%s-%s' | format('a', 2) }} {{ '%(a)s' | format(a=1) }}
{{ 'a' 'b' }} {{ "tab\tnl\\n \x41 \u00e9 \101 \q" }}
{{ tools.numbers | sort }} {{ tools.words | sort }} {{ tools.words | sort(case_sensitive=true) }} {{ tools.numbers | sort(reverse=true) }} {{ tools.people | sort(attribute='age') | map(attribute='name') | list }}
{{ ['a', 1] | sort }}
{{ tools.numbers | min }} {{ tools.numbers | max }} {{ tools.numbers | sum }} {{ tools.people | sum(attribute='age') }} {{ [] | max }}| {{ tools.people | max(attribute='age') }}
{{ tools.numbers | first }} {{ tools.numbers | last }} {{ [] | first }}| {{ 'abc' | last }} {{ tools.numbers | reverse | list }} {{ 'abc' | reverse }}
{{ none | selectattr('age', 'equalto', 36) | list }} {{ 0 | map('upper') | list }} {{ '' | reject('none') | list }} {{ none | map(attribute='a') | list }}
{{ 1 | select | list }}
{{ tools.people | selectattr('age', 'equalto', 36) | map(attribute='name') | list }} {{ tools.people | selectattr('town') | list | length }} {{ tools.people | rejectattr('town', 'defined') | map(attribute='name') | join }}
{{ tools.numbers | select('odd') | list }} {{ tools.numbers | reject('>', 2) | list }} {{ [0, 1, '', 'a'] | select | list }} {{ tools.people | map(attribute='town.name', default='?') | list }}
{{ tools.words | map('replace', 'p', 'q') | join(' ') }} {{ tools.words | map('length') | list }} {{ ['1', 'x'] | map('int', 7) | list }}
{{ tools.people | groupby('age') | map('first') | list }} {% for age, group in tools.people | groupby('age') %}{{ age }}:{{ group | map(attribute='name') | join('+') }};{% endfor %}
{{ ['a', 'A', 'b', 'a'] | unique | list }} {{ {'b': 1, 'A': 2} | dictsort }} {{ {'b': 1, 'a': 2} | dictsort(by='value') }} {{ {'b': 1, 'a': 2} | dictsort(reverse=true) }}
{{ tools.numbers | batch(3) | list }} {{ tools.numbers | batch(3, 0) | list }} {{ tools.numbers | slice(3) | list }} {{ tools.numbers | slice(3, 0) | list }}
{{ '42' | int }} {{ '4.7' | int }} {{ 'x' | int }} {{ 'x' | int(-1) }} {{ 3.9 | int }} {{ '0x1f' | int(base=16) }} {{ ' 7 ' | int }} {{ '1.5' | float }} {{ 'x' | float }} {{ none | int }} {{ true | int }} {{ 5 | float }}
{{ 2.5 | round }} {{ 3.5 | round }} {{ 2.675 | round(2) }} {{ 42 | round }} {{ 1.25 | round(1) }} {{ 1.21 | round(1, 'ceil') }} {{ 1.29 | round(1, 'floor') }} {{ 1234 | round(-2) }} {{ -3 | abs }} {{ -2.5 | abs }}
{{ 'a\nb\n\nc' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 'a\n\nb' | indent(1, blank=true) }}|{{ 'a\nb' | indent('> ') }}|{{ 'a\n' | indent }}
{{ 'foo bar baz qux' | truncate(9) }} {{ 'foo bar baz qux' | truncate(9, true) }} {{ 'foo bar baz qux' | truncate(11, false, '..', 0) }} {{ 'foo bar' | wordcount }} {{ 'ab' | center(6) }}|
{{ '<a href="x">' | e }} {{ "it's & co" | escape }} {{ '<b>' | safe }} {{ '<b>' }}
{{ [1, [2]] | string | length }} {{ 'é😀' | length }} {{ {'a': 1} | length }} {{ (1, 2) | count }}
{{ 5 | length }}
{{ 'x' | nosuch }}
{{ 'x' is nosuch }}
{{ 1 is odd }} {{ 2 is even }} {{ 6 is divisibleby 3 }} {{ 1 is number }} {{ true is number }} {{ true is integer }} {{ 1.0 is float }} {{ 'a' is string }} {{ [] is sequence }} {{ {} is mapping }} {{ 'a' is iterable }} {{ 1 is iterable }} {{ {} is sequence }}
{{ none is none }} {{ true is true }} {{ 1 is true }} {{ false is boolean }} {{ 'a' is lower }} {{ 'A' is upper }} {{ 1 is eq 1 }} {{ 1 is ne(2) }} {{ 2 is gt 1 }} {{ 1 is in [1] }} {{ 'a' is not none }} {{ 1 is sameas 1 }} {{ range is callable }} {{ 'upper' is filter }} {{ 'odd' is test }}
{{ 1 is not string and true }} {{ not 1 is string }} {{ 1 is string or 2 }} {{ 'x' if missing is undefined else 'y' }}
{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}|{{ strftime_now('%A, %B %-d, %y %I:%M %p') }}|{{ strftime_now('%a %j %U %W %w %u %e %Z%z%%') }}|{{ strftime_now('%D %F %T %R %G-W%V %C %h') }}|{{ strftime_now('%c|%x|%X') }}|{{ strftime_now('%-m/%-d %-H %-I %-M %-S %-j %^a') }}
{{ strftime_now() }}
{{ raise_exception('stop') }}
{% set ns = namespace(a=1, b='x') %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% set outer = i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ outer }}{{ ns.c }}|
{% set ns = namespace() %}{% set ns.x = [] %}{% for w in tools.words %}{% set ns.x = ns.x + [w] %}{% endfor %}{{ ns.x }}
{% set x = {} %}{% set x.y = 1 %}
{% set ns = namespace(_a=1) %}
{% set ns = namespace({'k': 1}) %}{{ ns.k }} {{ ns['k'] }}
{{ dict(a=1, b=2) }} {{ dict([('a', 1)], c=3) }} {{ dict({'a': 1}) }}
{% set a, b = 1, 2 %}{{ a + b }} {% set a, b = b, a %}{{ a }}{{ b }} {% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% set a, b = [1, 2, 3] %}
{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% with x = 3, y = 4 %}{{ x }}{{ y }}{% set x = 5 %}{% endwith %}{{ x }}{{ y }}|
{% set x %}a{{ 1 }}{% endset %}{{ x }} {% set y | upper | trim %} b {% endset %}{{ y }} {% filter upper | replace('A', 'o') %}banana{% endfilter %}
{% for w in tools.words %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}{{ loop.index0 }}{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{{ loop.depth }};{% endfor %}
{% for n in [1, 1, 2] %}{{ loop.changed(n) }}{% endfor %} {% for n in [] %}x{% else %}none{% endfor %} {% for n in tools.numbers if n > 1 %}{{ loop.index }}:{{ n }}{{ ',' if not loop.last }}{% endfor %}
{% for n in tools.numbers %}{% if n == 1 %}{% continue %}{% endif %}{% if n == 10 %}{% break %}{% endif %}{{ n }}{% endfor %}
{% for k in {'a': 1, 'b': 2} %}{{ k }}{% endfor %} {% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %} {% for c in 'héy' %}{{ c }}.{% endfor %} {% for i in range(3) %}{{ i }}{% endfor %}
{% for x in 5 %}{% endfor %}
{% for x in [[1, [2, 3]], [4]] recursive %}{{ loop(x) if x is iterable else x }}{{ loop.depth0 }},{% endfor %}
{% macro m(a, b='B', c=a) %}[{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, 4) }}{{ m(a='x', z=1) }}{{ m() }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(b=2) }}
{% macro m(x) %}<{{ caller(x) }}{{ caller(2) }}>{% endmacro %}{% call(y) m(1) %}({{ y }}){% endcall %} {% macro n() %}{{ caller is defined }}{% endmacro %}{{ n() }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }} {% set x = 'late' %}{% macro g() %}{{ x }}{{ inner }}{% endmacro %}{% set x = 'later' %}{% for inner in [1] %}{{ g() }}{% endfor %}
{% generation %}said{% set hidden = 1 %}{% endgeneration %}{{ hidden }}|{%- generation -%} x {%- endgeneration -%}|
{% raw %}{{ not }} {% this %}{% endraw %}{# a comment {{ x }} #}after
{{ "{{" }} {{ '}}' }} {{ {'a': {'b': 1}}['a']['b'] }}{{ {}}}
a  {%- if true -%}  b  {%- endif -%}  c {{- ' d ' -}} e
{% if false %}a{% elif missing %}b{% elif 1 %}c{% else %}d{% endif %}
{{ messages is defined }} {{ messages | length }} {{ tools is mapping }} {{ documents is none }} {{ add_generation_prompt }} {{ undefined_thing is defined }}
{{ (1, 2, 3) | tojson }} {{ [1, 2, 3][:2] | tojson }} {{ 'a"b' | tojson }}
{{ [1, 2, 3] | map('string') | join('') }} {{ (tools.words | map('upper'))[0] }}|
{{ tools.words | map('upper') | length }}
{{ ('abc' | attr('upper'))() }} {{ ('abc' | attr('nosuch')) is defined }}
{{ tools.people[0] | attr('name') }}| {{ tools.people[0]['name'] }} {{ tools.people.0.name }} {{ tools.people[-1].town }}|
{{ tools['numbers'][1:][0] }} {{ (tools.words + ['x']) | length }} {{ tools.words[0][1:] ~ '!' }} {{ -tools.numbers[0] }} {{ +5 }}
{{ 'x' ~ 1 + 2 }}
{{ 1 + 2 ~ 'x' }}
{{ 'a' if true else 'b' | upper }} {{ ('a' if false else 'b') | upper }} {{ 1 ~ 1 | string }}
{{ 1 + 1 | string }}
{{ 1 + 1 | string | length }} {{ -1 | abs }} {{ (-1) | abs }} {{ not false == true }}
{{ {'a': 1, **{'b': 2}} }}
{{ [x for x in tools.words] }}
{{ dict(**{'a': 1}) }} {{ '{} {}'.format(*['a', 'b']) }}
{{ lipsum is undefined_test }}
"""

# Pieces with lines of their own: what becomes of blanks and line ends around tags.
LINES = [
    "  {% if true %}\n  a\n  {% endif %}\n b\n",
    "{% for x in [1, 2] %}\n  {{ x }}\n{% endfor %}\nend\n\n",
    "a\n  {#- note -#}  \nb\n  {# note #}\nc {# note #}\nd",
    "{%+ if true %}\n a\n  {%+ endif +%}\nb",
    "x {% if true -%}\n\n  y\n{%- endif %}\n z",
    "{{ 1 }}\n\n{{ 2 -}}\n 3\n   {{- 4 }}",
    "\r\n{% if true %}\r\na\r\n{% endif %}\rb",
    "  {% raw %}\n {{ x }}\n  {% endraw %}\n y",
    " {%- raw -%} \n {{ x }} {%- endraw -%} \n y",
    "\n\n  {% set x = 1 %}\n\t{% set y = 2 %}\n{{ x }}{{ y }}\n",
    "a {% set x = 1 %} b\n c {%- set y = 1 %}\n d",
    "{% if true %}a{% endif %}\n  {% if true %}  b{% endif %}  \n",
]

TEMPLATES = {
    # After Llama 3.1: dates, tools in the system's or the first user's turn, calls as JSON, results as another role.
    "llama31": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set head = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set head = "" %}
{%- endif %}
{{- "<|head|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n" + head + "<|turn|>" }}
{%- if tools_in_user_message and tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("tools need a first user message") }}
    {%- endif %}
    {{- '<|head|>user<|end|>\\n\\nFunctions:\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|turn|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|turn|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|end|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|turn|>" }}
    {%- else %}
        {{- "<|head|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|turn|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    # After Qwen 2.5 and 3: tools as lines of JSON, thoughts cut out of older turns, results gathered into a user's
    # turn.
    "qwen": """{%- if tools %}
    {{- '<|start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|stop|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|start|>system\\n' + messages[0].content + '<|stop|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|start|>' + message.role + '\\n' + message.content + '<|stop|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|stop|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|start|>user' }}
        {%- endif %}
        {{- '\\n<result>\\n' + message.content + '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|stop|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    # After Mistral: turns have to alternate, ids have nine letters, tools stand before the last user's turn, JSON is
    # joined by hand.
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("ids of calls have nine letters!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[RESULTS] {"content": ' + content|string + ', "id": "' + message.tool_call_id + '"}[/RESULTS]' }}
    {%- else %}
        {{- raise_exception("only user, assistant, system and tool have turns") }}
    {%- endif %}
{%- endfor %}
""",
    # After Gemma 3: parts and texts, the system's words inside the first turn.
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<turn>' + role + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<turn>model\\n' }}
{%- endif -%}
""",
    # After Phi 3: one line of tags.
    "phi": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
           "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + "
           "'<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
           "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    # After DeepSeek: everything in one line's state, thoughts split off, calls in fences.
    "deepseek": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}
{%- for message in messages %}{% if message['role'] == 'system' %}{% if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{% else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{% endif %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<|User|>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' in message %}
        {%- set ns.is_tool = false %}
        {%- for tool in message['tool_calls'] %}
            {%- if not ns.is_first %}
                {%- if message['content'] is none %}{{ '<|Assistant|><|calls|>' }}{% else %}{{ '<|Assistant|>' + message['content'] + '<|calls|>' }}{% endif %}
                {%- set ns.is_first = true %}
            {%- else %}
                {{- '\\n' }}
            {%- endif %}
            {{- tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] | tojson + '\\n```<|call_end|>' }}
        {%- endfor %}
        {{- '<|calls_end|>' + eos_token }}
    {%- endif %}
    {%- if message['role'] == 'assistant' and 'tool_calls' not in message %}
        {%- if ns.is_tool %}
            {{- '<|outputs_end|>' + message['content'] + eos_token }}{% set ns.is_tool = false %}
        {%- else %}
            {%- set content = message['content'] %}
            {%- if '</think>' in content %}{% set content = content.rsplit('</think>', 1)[-1] %}{% endif %}
            {{- '<|Assistant|>' + content + eos_token }}
        {%- endif %}
    {%- endif %}
    {%- if message['role'] == 'tool' %}
        {%- set ns.is_tool = true %}
        {%- if ns.is_output_first %}{{ '<|outputs|><|output|>' + message['content'] + '<|output_end|>' }}{% set ns.is_output_first = false %}{% else %}{{ '\\n<|output|>' + message['content'] + '<|output_end|>' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.is_tool %}{{ '<|outputs_end|>' }}{% endif %}
{%- if add_generation_prompt and not ns.is_tool %}{{ '<|Assistant|><think>\\n' }}{% endif %}
""",
    # After SmolVLM and Idefics: parts alone.
    "smolvlm": "<|start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' "
               "%}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' "
               "%}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end>\n{% endfor %}"
               "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    # After Llama 4: parts or texts by a macro.
    "llama4": """{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- part.text | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token }}
{%- for message in messages %}
    {{- '<|h|>' ~ message.role ~ '<|/h|>\\n\\n' ~ render(message.content) }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name ~ '(' }}
        {%- for name, value in call.function.arguments.items() %}
            {{- name ~ '=' ~ (value if value is not string else "'" ~ value ~ "'") }}
            {{- ', ' if not loop.last else '' }}
        {%- endfor %}
        {{- ')' }}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}
""",
    # After SmolLM 3 and Granite: dates, Python's text of a tool, dictsort, a mark for trainers.
    "documents": """{%- set system = namespace(text='You are careful.') %}
{%- if messages[0].role == 'system' %}{% set system.text = messages[0].content.rstrip() %}{% endif %}
{{- '<|system|>Knowledge until June 2025.\\nToday: ' + strftime_now("%B %-d, %Y") + '\\n' + system.text }}
{%- if tools %}
    {{- '\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool['function'] | string + '\\n' }}
        {%- for name, spec in tool.function.parameters.properties | dictsort %}
            {{- '- %s (%s)' % (name, spec.type) ~ ('*' if name in tool.function.parameters.required) ~ '\\n' }}
        {%- endfor %}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{{- '\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'assistant' %}
        {% generation %}
            {{- '<|assistant|>' ~ (message.content or '') }}
            {%- if message.tool_calls %}{{- message.tool_calls | map(attribute='function') | map(attribute='name') | join(',') }}{% endif %}
            {{- eos_token }}
        {% endgeneration %}
    {%- else %}
        {{- '<|{0}|>{1:s}\\n'.format(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    # After Hermes and gpt-oss: a schema written as types, by a macro that calls itself.
    "types": """{%- macro kind(spec, depth=0) -%}
    {%- if spec.type == 'array' -%}
        {{- kind(spec['items'], depth + 1) + '[]' -}}
    {%- elif spec.type == 'object' -%}
        {{- '{ ' -}}
        {%- for name, inner in spec.properties.items() -%}
            {{- name -}}
            {%- if name not in (spec.required or []) -%}{{- '?' -}}{%- endif -%}
            {{- ': ' + kind(inner, depth + 1) -}}
            {{- ', ' if not loop.last -}}
        {%- endfor -%}
        {{- ' }' -}}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type is sequence and spec.type is not string -%}
        {{- spec.type | join(' | ') -}}
    {%- else -%}
        {{- {'integer': 'number', 'string': 'string'}[spec.type] | default(spec.type) -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools %}
namespace functions {
{% for tool in tools %}
// {{ tool.function.description | replace('\\n', ' ') }}
type {{ tool.function.name }} = (_: {{ kind(tool.function.parameters) }}) => any;
{% endfor %}
}
{% endif %}
{%- for message in messages %}
{{ '\\n' if not loop.first }}{{ message.role | upper }}> {% if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls | default([], true) %}
{{ call.function.name }} {{ call.function.arguments | tojson(separators=(',', ':'), sort_keys=true) }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}

ASSISTANT>{% endif %}""",
}


def part(text):
    return [{"type": "text", "text": text}]


CONVERSATIONS = {
    "one": [{"role": "user", "content": " Why is the sky \"blue\"? \u4f60\u597d <b> "}],
    "system": [
        {"role": "system", "content": "  You answer briefly.\n"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"},
        {"role": "user", "content": "And at sunset?"},
    ],
    "ended": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."}],
    "twice": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}],
    "calls": [
        {"role": "user", "content": "How warm is it in Ely, and in \"York\"?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call00001", "type": "function",
             "function": {"name": "warmth", "arguments": {"town": "Ely \u2014 caf\u00e9", "days": 2, "exact": True, "limit": 1.0}}}]},
        {"role": "tool", "name": "warmth", "tool_call_id": "call00001", "content": "{\"degrees\": 21.5}"},
        {"role": "assistant", "content": "It is 21.5 degrees."},
        {"role": "user", "content": "Thanks"},
    ],
    "two_calls": [
        {"role": "user", "content": "Both towns"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "warmth", "arguments": {"town": "Ely"}}},
            {"id": "call00002", "type": "function", "function": {"name": "warmth", "arguments": {"town": "York"}}}]},
        {"role": "tool", "name": "warmth", "tool_call_id": "call00001", "content": "21"},
        {"role": "tool", "name": "warmth", "tool_call_id": "call00002", "content": "19"},
    ],
    "texts_in_parts": [
        {"role": "system", "content": part("Be brief.")},
        {"role": "user", "content": part("Hi, ") + part("you")},
        {"role": "assistant", "content": part("Hello")},
        {"role": "user", "content": part("Sure?")},
    ],
    "parts": [
        {"role": "system", "content": part("Be brief.")},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is "}, {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": part("A cat.")},
        {"role": "user", "content": part("Sure?")},
    ],
}

TOOLS = [{"type": "function", "function": {
    "name": "warmth", "description": "How warm it is.\nDegrees & more <C>.",
    "parameters": {"type": "object", "properties": {
        "town": {"type": "string", "description": "The town's name, \"Ely\" or so"},
        "days": {"type": "integer", "minimum": 1.0},
        "scale": {"type": "string", "enum": ["C", "F"]},
        "items": {"type": "array", "items": {"type": ["number", "null"]}}}, "required": ["town"]},
    "return": {"type": "number"}}}]


# In what form a template takes what is said; the others take texts.
TAKES = {"smolvlm": ["parts"], "gemma": ["text", "parts"], "llama4": ["text", "parts"]}


def fitted(name, messages):
    """What is said in a form that the template takes, or None where there is none: what Lacuna does before it renders."""
    takes = TAKES.get(name, ["text"])
    out = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str) and "text" not in takes:
            content = part(content)
        elif isinstance(content, list) and "parts" not in takes:
            if any("text" not in p for p in content):
                return None
            content = "".join(p["text"] for p in content)
        out.append(dict(message, content=content))
    return out


def rendered(source, messages, prompt, tools):
    if messages is None:
        return None
    try:
        out, _ = utils.render_jinja_template(
            conversations=[messages], tools=tools, chat_template=source, add_generation_prompt=prompt,
            bos_token="<s>", eos_token="</s>")
        return out[0]
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, OverflowError):
        return None


def piece(source):
    try:
        template = utils._compile_jinja_template(source)
        return template.render(messages=[], tools=DATA, documents=None, add_generation_prompt=True, bos_token="<s>",
                               eos_token="</s>")
    except (jinja2.exceptions.TemplateError, TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, OverflowError):
        return None


def main():
    utils.datetime = Clock
    pieces = PIECES.strip("\n").split("\n") + LINES
    cases = []
    for name, source in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for prompt, tools in ((True, None), (False, TOOLS)):
                text = rendered(source, fitted(name, messages), prompt, tools)
                cases.append({"template": name, "conversation": conversation, "add_generation_prompt": prompt,
                              "tools": tools is not None, "rendered": text})
    whole = {
        "made_with": {"transformers": transformers.__version__, "jinja2": jinja2.__version__},
        "now": NOW.timestamp(), "data": DATA, "tools": TOOLS,
        "pieces": [[p, piece(p)] for p in pieces],
        "templates": TEMPLATES, "conversations": CONVERSATIONS, "cases": cases,
    }
    lines = []
    for key, value in whole.items():
        if key in ("pieces", "cases"):
            inner = ",\n".join(json.dumps(v, separators=(",", ":"), ensure_ascii=True) for v in value)
            lines.append(f"{json.dumps(key)}: [\n{inner}\n]")
        else:
            lines.append(json.dumps(key) + ": " + json.dumps(value, separators=(",", ":"), ensure_ascii=True))
    with open(sys.argv[1], "w", encoding="utf-8", newline="\n") as f:
        f.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
