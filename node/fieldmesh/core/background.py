"""What people ask when they ask about nothing in particular.

Owns: a few hundred short everyday questions in several languages: the contrast from which a classifier learns
which words say nothing about a domain ("what is the", "tell me", "wie viele"). Must not: mention what a
specialist is likely to be made for; a domain's own examples always outweigh these.
"""

from __future__ import annotations

from typing import Final

_ENGLISH: Final = """
What is the tallest mountain in Africa?
Which river flows through Vienna?
Who painted the Mona Lisa?
Who was the first emperor of Rome?
When was the printing press invented?
Where do penguins live?
Why is the sky blue?
How old is the universe?
How many countries are there in Europe?
How do magnets work?
How does a sailing boat go against the wind?
How long does it take to fly from Tokyo to Sydney?
How much does an elephant weigh?
What language do they speak in Morocco?
What are the seven wonders of the ancient world?
What happened at the battle of Waterloo?
What does the word serendipity mean?
What is the opposite of generous?
What is the meaning of this proverb?
What time is it in New York?
What day is it today?
What is your favourite colour?
What can you do for me?
What should I wear to a wedding?
What should I buy my mother for her anniversary?
What would be a nice present for a friend who likes gardening?
Which instrument is easiest to learn?
Which film won the Oscar last year?
Which football team has won the most championships?
Which is better, tea or coffee?
Who are you?
Who invented the telephone?
Who is the author of this famous play?
Whose portrait is on the banknote?
Tell me a story about a dragon
Tell me something interesting about whales
Tell me about the history of Egypt
Tell me how to get to the station
Give me a recipe for apple pie
Give me five tips for a job interview
Give me a list of good board games for children
Give me an example of a metaphor
Write a letter to my landlord
Write a birthday card for my grandfather
Write a song about the sea
Write an e-mail that invites my colleagues to lunch
Write an essay about friendship
Write a summary of this article
Create a shopping list for a barbecue
Create a travel itinerary for Japan
Make a plan for spring cleaning
Make this sentence sound more polite
Correct the grammar of this paragraph
Rewrite this text in simple words
Translate this sentence into French
How do you say thank you in Italian?
Explain how the stock exchange works
Explain the offside rule
Explain what inflation is to a child
Explain the difference between a crocodile and an alligator
Describe a sunset in the mountains
Describe your perfect day
Compare trains and planes for a trip to Paris
Suggest a title for my essay
Suggest some music for a dinner with friends
Recommend a museum in Amsterdam
Recommend a good restaurant near the harbour
Can you help me with my homework?
Can you recommend a documentary about space?
Can you tell me who won the election?
Can I grow tomatoes on my balcony?
Can a cat and a dog live together?
Could you explain the rules of poker?
Could you please repeat that?
Do you know any riddles?
Do bees sleep at night?
Does it snow in Madrid in winter?
Did people really walk on the moon?
Is it going to rain tomorrow?
Is there life on Mars?
Is a tomato a fruit or a vegetable?
Are sharks older than trees?
Are there direct trains to Prague?
Was Shakespeare a real person?
Were the pyramids painted?
Will robots replace teachers?
Would you rather live in a city or in the country?
Should I rent or buy a flat?
Have you ever seen a shooting star?
Has anyone ever swum across the Atlantic?
I want to learn to play the guitar, where should I start?
I want to plant a tree in my garden
I need a gift for my sister
I need an idea for a costume
I am looking for a quiet place for my holidays
I am bored, what can I do?
I would like to know more about volcanoes
I have two tickets for the theatre, who should I take with me?
I have to give a speech at my brother's wedding
I cannot decide between these two jobs
I do not understand this poem
I think my neighbour is too loud
I forgot the name of that actor
My friend is angry with me, what should I say?
My daughter wants a pet, which one is easy to keep?
My flight was cancelled, what are my rights?
My car makes a strange noise when I brake
My plants are turning yellow
My neighbours always park in front of my house
We are five people and need a place to stay near the beach
We want to visit a castle on Sunday
He never answers my letters, why?
She wants to become an astronaut
They moved to another town last summer
There is a spider in the kitchen
There are three boxes and only one has a prize
It is raining and the children want to play
Let us play a game
Let me know when the shops are open
Please sing me a lullaby
Please find a synonym for beautiful
Good morning, how are you?
Hello, nice to meet you
Thanks, that was very helpful
Goodbye and see you soon
Sort these cities by their population
Name three famous composers
Name an animal that begins with Z
List the planets of the solar system
List some advantages of public transport
Count from one to twenty in German
Spell the word necessary
Define the word democracy
Add a few more details to the story
Find out who discovered penicillin
Show me a map of Scandinavia
Choose a number between one and ten
Think of a name for my new bakery
Plan a menu for a vegetarian dinner
Calculate the tip for a bill of forty euros
Convert ten miles to kilometres
Remind me to call my aunt at noon
Turn the lights off in the living room
Set an alarm for seven o'clock
Play some jazz
Where can I buy second-hand furniture?
Where is the nearest supermarket?
Where does chocolate come from?
Where should we go on our honeymoon?
When does summer begin in Australia?
When is the next full moon?
When did dinosaurs become extinct?
Why do cats purr?
Why did the Roman empire fall?
Why are flamingos pink?
Why does bread rise?
How can I save money on my electricity bill?
How can I make new friends in a new city?
How can I tell whether a melon is ripe?
How can I remove a stain from a carpet?
How do I fold a paper plane?
How do I renew my passport?
How do I get rid of moths?
How do I train my dog to sit?
How do I open a bank account abroad?
How do I write a good cover letter?
How does the electoral system work in Ireland?
How far is it from Berlin to Warsaw?
How high can a kangaroo jump?
How often should I water a cactus?
How many strings does a harp have?
How many players are there in a volleyball team?
How many days are left until Christmas?
How much money do I need for a month in Thailand?
How should I prepare for a marathon?
How was paper made in the Middle Ages?
How to tie a tie
How to peel a mango
Fun facts about octopuses
Best beaches in Portugal
Cheap hotels in Budapest
Things to do in London on a rainy day
Ideas for a school project about water
History of the bicycle in a few sentences
The plot of the film with the shark
Meaning of the name Sophie
Quotes about hope by famous writers
Difference between weather and climate
Pros and cons of living alone
Who is the president of Finland?
What was the name of the ship that sank in 1912?
What kind of bird is black and white with a long tail?
What makes a good leader?
What do you think about modern art?
What do owls eat?
What did people wear in the eighteenth century?
What are some good books about pirates?
What are the ingredients of pesto?
What is the best way to learn vocabulary?
What is the best season to visit Norway?
What is the fastest animal on land?
What is the most spoken language in the world?
What is the name of the national anthem of Spain?
What is the point of philosophy?
What is the price of gold today?
What is the story behind Halloween?
What is special about this painting?
What is jazz?
What is a haiku?
What is an opera?
What if the moon disappeared?
What's the score of the match?
What's the population of Iceland?
Who's your favourite singer?
Where's the best place to see the northern lights?
How's the traffic this morning?
"""

_OTHERS: Final = """
Was ist die Hauptstadt von Ungarn?
Wie viele Einwohner hat Hamburg?
Wer hat dieses Lied geschrieben?
Wie komme ich am besten zum Bahnhof?
Warum ist das Meer salzig?
Kannst du mir ein gutes Buch empfehlen?
Schreibe einen Brief an meine Tante
Ich suche ein Geschenk für meinen Bruder
Erkläre mir, wie ein Vulkan entsteht
Was soll ich heute Abend kochen?
Quelle est la capitale du Canada ?
Combien de personnes vivent en Belgique ?
Qui a peint ce tableau ?
Comment aller à la gare ?
Pourquoi les feuilles tombent-elles en automne ?
Peux-tu me recommander un bon film ?
Écris un poème sur la neige
Je cherche un cadeau pour ma mère
Explique-moi les règles du tennis
Qu'est-ce que je peux faire ce week-end ?
¿Cuál es la capital del Perú?
¿Cuántos habitantes tiene Madrid?
¿Quién escribió esta novela?
¿Cómo llego a la playa?
¿Por qué vuelan los pájaros?
¿Me puedes recomendar un restaurante?
Escribe una carta a mi abuela
Quiero aprender a bailar
Cuéntame un cuento corto
¿Qué tiempo hace hoy?
Qual é a capital da Noruega?
Quantas pessoas moram no Porto?
Quem inventou o rádio?
Como faço para chegar ao aeroporto?
Escreva uma mensagem para o meu amigo
Qual è il fiume più lungo d'Italia?
Quante persone abitano a Milano?
Chi ha scritto questo romanzo?
Come si arriva alla stazione?
Consigliami un libro per le vacanze
Wat is de hoofdstad van Zweden?
Hoe kom ik bij het station?
Kun je een goed boek aanraden?
Jaka jest stolica Czech?
Ile osób mieszka w Krakowie?
Kto napisał tę książkę?
Türkiye'nin en uzun nehri hangisi?
Bana kısa bir hikaye anlatır mısın?
Bugün hava nasıl?
Какая столица Японии?
Сколько людей живёт в Москве?
Кто написал этот роман?
Как добраться до вокзала?
Расскажи мне интересную историю
Почему небо голубое?
Яка столиця Франції?
ما هي عاصمة المغرب؟
كم عدد سكان مصر؟
من كتب هذه الرواية؟
كيف أصل إلى المحطة؟
اكتب قصيدة قصيرة عن البحر
لماذا السماء زرقاء؟
מהי בירת יוון?
איך מגיעים לתחנה?
پایتخت ایتالیا کجاست؟
چطور می‌توانم به ایستگاه بروم؟
भारत की सबसे लंबी नदी कौन सी है?
मुझे एक छोटी कहानी सुनाओ
आज मौसम कैसा है?
এই বইটি কে লিখেছেন?
法国的首都是哪里？
中国有多少人口？
这首歌是谁写的？
怎么去火车站？
为什么天空是蓝色的？
给我讲一个故事
请推荐一本好书
帮我写一封信
今天天气怎么样？
我想去旅行，有什么建议？
最近的超市在哪里？
这个词是什么意思？
怎么学好英语？
你可以帮我吗？
这部电影有多长？
多久能到上海？
什么时候放假？
日本で一番高い山は何ですか？
この本を書いたのは誰ですか？
駅までどうやって行きますか？
どうして空は青いのですか？
短い物語を書いてください
おすすめの映画を教えてください
今日の天気はどうですか？
週末に何をしたらいいですか？
一番近いスーパーはどこですか？
この言葉の意味は何ですか？
英語を勉強したいです
この駅からいくらかかりますか？
次の電車はいつですか？
手伝ってくれますか？
한국에서 가장 높은 산은 무엇입니까?
이 노래는 누가 불렀어요?
역까지 어떻게 가나요?
재미있는 이야기를 들려주세요
오늘 날씨가 어때요?
เมืองหลวงของญี่ปุ่นคืออะไร
ใครเป็นคนเขียนหนังสือเล่มนี้
ไปสถานีรถไฟอย่างไร
ช่วยเล่านิทานให้ฟังหน่อย
วันนี้อากาศเป็นอย่างไร
ซูเปอร์มาร์เก็ตที่ใกล้ที่สุดอยู่ที่ไหน
คำนี้แปลว่าอะไร
ใครร้องเพลงนี้
เรียนภาษาอังกฤษอย่างไรดี
ร้านอาหารไหนดี
รถไฟออกเมื่อไร
ช่วยฉันได้ไหม
Thủ đô của Pháp là gì?
Hôm nay thời tiết thế nào?
Hãy kể cho tôi một câu chuyện
Apa ibu kota Australia?
Siapa yang menulis buku ini?
Bagaimana cara pergi ke stasiun?
Mji mkuu wa Kenya ni upi?
Nani aliandika kitabu hiki?
"""

TEXTS: Final = tuple(line for line in (_ENGLISH + _OTHERS).splitlines() if line)
