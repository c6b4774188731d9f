"""What is compared where the user names no data: one passage in several scripts, for tokens of every kind."""

from __future__ import annotations

TEXTS: tuple[str, ...] = (
    "A lighthouse keeper counts the ships that pass at night. Most of them carry grain or timber to the "
    "northern harbours, some carry letters, and one, he is quite sure, carries nothing but lamps. When the "
    "fog comes in he rings the bell every 45 seconds and writes the hour, the wind and the height of the "
    "water into a book that nobody reads. In the morning he sleeps until the gulls wake him, mends a rope, "
    "and walks to the village for bread and news.",
    "那位看守灯塔的人每晚都数经过的船只。大多数船运送谷物或木材到北方的港口，有些运送信件，还有一艘船，他很确"
    "定，只运送灯。起雾的时候，他每隔四十五秒敲一次钟，并把时间、风向和水位写进一本没有人读的书里。早上他一直"
    "睡到海鸥把他叫醒，修补一根绳子，然后走到村子里去买面包，听听消息。",
    "def ships_per_hour(log: list[tuple[float, str]]) -> dict[int, int]:\n"
    '    """Count the ships of each hour; times are in hours since noon."""\n'
    "    counts: dict[int, int] = {}\n"
    "    for time, kind in log:\n"
    '        if kind != "fog":\n'
    "            counts[int(time)] = counts.get(int(time), 0) + 1\n"
    "    return counts\n"
    "\n"
    "\n"
    'print(ships_per_hour([(7.25, "grain"), (7.5, "fog"), (8.0, "timber")]))  # {7: 1, 8: 1}\n',
    "El farero cuenta los barcos que pasan de noche. La mayoría lleva grano o madera a los puertos del norte, "
    "algunos llevan cartas, y uno, está bastante seguro, no lleva más que lámparas. Cuando llega la niebla "
    "toca la campana cada 45 segundos y anota la hora, el viento y la altura del agua en un libro que nadie "
    "lee.",
    "حارس المنارة يعدّ السفن التي تمرّ في الليل. معظمها يحمل الحبوب أو الخشب إلى موانئ الشمال، وبعضها يحمل "
    "الرسائل، وواحدة منها، وهو متأكد من ذلك، لا تحمل سوى المصابيح. وعندما يأتي الضباب يقرع الجرس كل خمس "
    "وأربعين ثانية.",
    "Смотритель маяка считает корабли, которые проходят ночью. Большинство везёт зерно или лес в северные "
    "гавани, некоторые везут письма, а один, он в этом почти уверен, не везёт ничего, кроме ламп. Когда "
    "приходит туман, он звонит в колокол каждые 45 секунд и записывает час, ветер и уровень воды в книгу, "
    "которую никто не читает.",
    "प्रकाशस्तंभ का रखवाला रात में गुज़रने वाले जहाज़ों को गिनता है। उनमें से ज़्यादातर उत्तर के बंदरगाहों तक "
    "अनाज या लकड़ी ले जाते हैं, कुछ चिट्ठियाँ ले जाते हैं, और एक, उसे पूरा यक़ीन है, सिर्फ़ दीये ले जाता है।",
)
